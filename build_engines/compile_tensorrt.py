"""An ONNX graph to a TensorRT or TensorRT-RTX engine; TensorRT-RTX needs no GPU for it."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stg_trt.engines.tensorrt_library import (
    PLUGIN_VERSION,
    library_version,
    load_library,
    load_plugins,
)
from stg_trt.engines.tensorrt_runtime import error_log, lacks_memory, open_builder
from stg_trt.errors import GateMissed, OutOfDeviceMemory, StgTrtError
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.system.interruptible import run_interruptibly

from .compiler import Compiled, Exported, Job
from .onnx_compiler import ExportedGraph, OnnxCompiler
from .reusable_files import ReusableFiles

FLAGS = ("strongly_typed", "max_aux_streams=0", "require_user_allocation")
# A fused attention names its kernel once as a whole word in the plan; its variants carry suffixes.
_MHA_KERNEL = re.compile(rb"(?<![\w.])_gemm_mha_v2(?![\w.])")
_ACTIVATION = re.compile(r"Total Activation Memory: (\d+)")


class Cancelled(Exception):
    """The user interrupted the compilation."""


class TensorRTCompiler(OnnxCompiler):
    """TensorRT, or TensorRT-RTX."""

    @property
    def version(self) -> str:
        """The library's; raises BackendUnavailable where it or a plugin is not there."""
        if self.options.plugins:
            load_plugins(self.options.backend.name)
        return library_version(self.options.backend.name)

    def flags(self, target: str) -> tuple[str, ...]:
        """The builder's options."""
        return (*FLAGS, *(f"plugin={name}/{PLUGIN_VERSION}" for name in self.options.plugins))

    def compile(self, job: Job, exported: Exported, target: str, finished: ReusableFiles) -> Compiled:
        """The graph as an engine for one GPU architecture."""
        assert isinstance(exported, ExportedGraph)
        return compile_tensorrt(
            exported.graph,
            job.inputs,
            job.rows,
            backend=self.options.backend.name,
            target=target,
            on_progress=lambda phase: job.on_progress(f"compile for {target}: {phase}"),
        )


def compile_tensorrt(
    graph: Path,
    inputs: Sequence[TensorSpec],
    rows: tuple[int, int, int],
    *,
    backend: str,
    target: str,
    on_progress: Callable[[str], None],
) -> Compiled:
    """Compiles `graph` for rows (min, opt, max); the engine is written beside it.

    An interrupt stops the compiler at the next step of its progress.
    """
    trt = load_library(backend)
    cancel = threading.Event()
    return run_interruptibly(
        lambda: _compile(trt, graph, inputs, rows, backend, target, cancel, on_progress), cancel.set
    )


def _compile(
    trt: Any,
    graph: Path,
    inputs: Sequence[TensorSpec],
    rows: tuple[int, int, int],
    backend: str,
    target: str,
    cancel: threading.Event,
    on_progress: Callable[[str], None],
) -> Compiled:
    heard: list[str] = []
    log = error_log(trt, heard.append)
    builder = open_builder(trt, backend, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(os.fspath(graph)):
        errors = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise GateMissed(
            f"{graph.stem}: {backend} cannot read the graph: {errors}: look at it with --keep-onnx"
        )
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, inputs, rows))
    config.progress_monitor = _monitor(trt, cancel, on_progress)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.max_aux_streams = 0
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # TensorRT-RTX only: contexts then never allocate, so that they can be captured in a graph.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if target.startswith("sm_"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper().replace("_", "")), 0)
    plan = builder.build_serialized_network(network, config)
    if cancel.is_set():
        raise Cancelled
    if plan is None:
        raise _why_not_compiled(graph.stem, backend, log.errors)
    engine = graph.with_suffix(f".{target}.engine")
    data = memoryview(plan)
    engine.write_bytes(data)
    return Compiled((engine,), len(_MHA_KERNEL.findall(data)), _activation_bytes(heard))


def _why_not_compiled(segment: str, backend: str, errors: list[str]) -> StgTrtError:
    if lacks_memory(errors):
        return OutOfDeviceMemory(
            f"{segment}: expected enough free GPU memory to try {backend}'s kernels in, got {errors[0]}: "
            "free some, use fewer frames, a smaller size or a smaller --max-batch"
        )
    return GateMissed(
        f"{segment}: {backend} cannot compile it: {'; '.join(errors[:3])}: look at the graph with --keep-onnx"
    )


def _activation_bytes(log: Sequence[str]) -> int | None:
    """What the builder only tells its log."""
    found = [match for message in log if (match := _ACTIVATION.search(message))]
    return int(found[-1][1]) if found else None


def _profile(builder: Any, inputs: Sequence[TensorSpec], rows: tuple[int, int, int]) -> Any:
    profile = builder.create_optimization_profile()
    for spec in inputs:
        if ROWS in spec.shape:
            profile.set_shape(spec.name, *(spec.with_rows(count) for count in rows))
    return profile


def _monitor(trt: Any, cancel: threading.Event, on_progress: Callable[[str], None]) -> Any:
    """Reports the builder's phases, and answers 'stop' once the user has interrupted."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            on_progress(phase)

        def phase_finish(self, phase: str) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            return not cancel.is_set()

    return Monitor()
