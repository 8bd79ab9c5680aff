"""An ONNX graph to a TensorRT or TensorRT-RTX engine; TensorRT-RTX needs no GPU for it."""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from stg_trt.engines.backends import THIS_GPU
from stg_trt.engines.key import digest
from stg_trt.engines.tensorrt_library import (
    PLUGIN_VERSION,
    library_version,
    load_library,
    load_plugins,
)
from stg_trt.engines.tensorrt_runtime import (
    error_log,
    lacks_memory,
    open_builder,
    open_runtime,
    read_engine,
)
from stg_trt.errors import EngineRejected, GateMissed, OutOfDeviceMemory, StgTrtError
from stg_trt.models.segment import Segment
from stg_trt.system.gpu import find_gpu
from stg_trt.system.interruptible import run_interruptibly

from .compiler import Compiled, Exported, Job, Rows
from .fused_attention import count_in_layers, count_in_plan
from .onnx_compiler import ExportedGraph, OnnxCompiler
from .refit import (
    FLAG,
    CannotRefit,
    check_marked,
    check_refittable,
    mark_weights,
    refit_engine,
    structure_sha256,
)
from .reproduction import tensorrt_commands
from .reusable_files import ReusableFiles
from .tensorrt_graph import choose_entries
from .tensorrt_recipe import Recipe
from .timing_cache import load_timings, save_timings

FLAGS = ("strongly_typed", "max_aux_streams=0", "require_user_allocation")
_ACTIVATION = re.compile(r"Total Activation Memory: (\d+)")


class Cancelled(Exception):
    """The user interrupted the compilation."""


class TensorRTCompiler(OnnxCompiler):
    """TensorRT, or TensorRT-RTX."""

    @property
    def version(self) -> str:
        """The library's; raises BackendUnavailable where it or a plugin is not there."""
        backend = self.options.backend.name
        if self.options.plugins:
            load_plugins(backend)
        version = library_version(backend)
        if self.options.refittable:
            check_refittable(backend, version, self.options.targets, find_gpu())
        return version

    def flags(self, target: str) -> tuple[str, ...]:
        """The builder's options."""
        level = self.options.builder_optimization_level
        levels = () if level is None else (f"builder_optimization_level={level}",)
        refit = (FLAG,) if self.options.refittable else ()
        plugins = (f"plugin={name}/{PLUGIN_VERSION}" for name in self.options.plugins)
        return (*FLAGS, *levels, *refit, *plugins)

    def profiles(self, segment: Segment) -> tuple[Rows, ...]:
        """TensorRT picks kernels for a profile's `opt` alone: each number of rows has a profile of its own.

        TensorRT-RTX picks them on the user's GPU for the rows at hand, whatever the profile, so it has one.
        More would add to its plan: measured with 1.7.1 on two blocks of 98 MB, profiles share the weights,
        and each adds 4 MB of kernels.
        """
        if self.options.backend.name == "tensorrt":
            return tuple((rows, rows, rows) for rows in self.options.row_counts(segment))
        return super().profiles(segment)

    def rewrite(self, graph: ir.Graph) -> None:
        """The timesteps of tokens without lookups."""
        super().rewrite(graph)
        choose_entries(graph)

    def compile(self, job: Job, exported: Exported, target: str, finished: ReusableFiles) -> Compiled:
        """The graph as an engine for one GPU architecture: that of other weights refitted, or compiled."""
        assert isinstance(exported, ExportedGraph)
        refittable = tuple(sorted(exported.weights)) if self.options.refittable else ()
        recipe = Recipe(
            graph=exported.graph,
            inputs=job.inputs,
            profiles=self.profiles(job.segment),
            backend=self.options.backend.name,
            target=target,
            builder_optimization_level=self.options.builder_optimization_level,
            timing_cache=self._timing_cache(target),
            plugins=bool(self.options.plugins),
            refittable=refittable,
        )
        attentions = self.options.checkpoint.family.attentions(job.segment)
        structure = structure_sha256(exported.graph, exported.weights) if refittable else None
        source = finished.take_engine(structure) if structure else None
        compiled = None
        if source is not None:
            job.on_progress(f"refit for {target}")
            compiled = refit_tensorrt(recipe, attentions, source)
        if compiled is None:
            compiled = compile_tensorrt(
                recipe, attentions, lambda phase: job.on_progress(f"compile for {target}: {phase}")
            )
        # Neither tool marks weights one by one.
        commands = () if refittable else tensorrt_commands(recipe)
        return replace(compiled, commands=commands, structure_sha256=structure)

    def _timing_cache(self, target: str) -> Path | None:
        """Beside the builds, one per GPU and version; TensorRT-RTX times nothing while it builds."""
        gpu = find_gpu() if target == THIS_GPU else None
        if gpu is None:
            return None
        facts = {"version": self.version, "gpu": str(gpu.identity)}
        return self.options.output / f"{self.options.backend.name}-{digest(facts)[:8]}.timings"


def compile_tensorrt(recipe: Recipe, attentions: int, on_progress: Callable[[str], None]) -> Compiled:
    """Compiles a graph with so many attentions; the engine is written beside it.

    An interrupt stops the compiler at the next step of its progress.
    """
    trt = load_library(recipe.backend)
    cancel = threading.Event()

    def work() -> Compiled:
        activation_bytes = build_engine(trt, recipe, cancel, on_progress)
        if recipe.refittable:
            check_marked(trt, recipe)
        if recipe.target == THIS_GPU:
            return inspect_engine(trt, recipe, attentions)
        return Compiled((recipe.engine,), count_in_plan(recipe.engine), activation_bytes)

    return run_interruptibly(work, cancel.set)


def refit_tensorrt(recipe: Recipe, attentions: int, source: Path) -> Compiled | None:
    """The engine of `source` with the graph's weights; None, after a warning, if TensorRT cannot refit it."""
    trt = load_library(recipe.backend)
    try:
        activation_bytes = refit_engine(trt, recipe, source)
    except (CannotRefit, EngineRejected) as error:
        warnings.warn(
            f"{recipe.segment}: compiled, since the engine of {source.parent.name} is not refitted: {error}",
            stacklevel=2,
        )
        return None
    if recipe.target == THIS_GPU:
        return replace(inspect_engine(trt, recipe, attentions), refitted=True)
    return Compiled((recipe.engine,), count_in_plan(recipe.engine), activation_bytes, refitted=True)


def build_engine(
    trt: Any, recipe: Recipe, cancel: threading.Event, on_progress: Callable[[str], None]
) -> int | None:
    """Writes the engine; returns the bytes of its activations where the builder tells its log."""
    heard: list[str] = []
    log = error_log(trt, heard.append)
    builder = open_builder(trt, recipe.backend, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(os.fspath(recipe.graph)):
        errors = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise GateMissed(
            f"{recipe.segment}: {recipe.backend} cannot read the graph: {errors}: look at it with --keep-onnx"
        )
    config = _configured(trt, builder, recipe)
    if recipe.refittable:
        mark_weights(trt, network, config, recipe)
    config.progress_monitor = _monitor(trt, cancel, on_progress)
    try:
        is_built = _stream_plan(trt, builder, network, config, recipe.engine)
        if cancel.is_set():
            raise Cancelled
        if not is_built:
            raise _why_not_compiled(recipe, log.errors)
    except BaseException:
        recipe.engine.unlink(missing_ok=True)
        raise
    if recipe.timing_cache is not None:
        save_timings(config, recipe.timing_cache)
    return _activation_bytes(heard)


def inspect_engine(trt: Any, recipe: Recipe, attentions: int) -> Compiled:
    """What the GPU's own runtime says of a finished engine; the layers are kept beside it."""
    log = error_log(trt)
    runtime = open_runtime(trt, recipe.backend, log)
    engine = read_engine(trt, recipe.backend, runtime, recipe.engine, log)
    layers = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    recipe.layers.write_text(layers, "utf-8")
    fused = count_in_layers(layers, attentions, len(recipe.profiles))
    return Compiled((recipe.engine, recipe.layers), fused, int(engine.device_memory_size_v2))


def _configured(trt: Any, builder: Any, recipe: Recipe) -> Any:
    """The builder's configuration, all but its monitor."""
    config = builder.create_builder_config()
    for rows in recipe.profiles:
        config.add_optimization_profile(_profile(builder, recipe, rows))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.max_aux_streams = 0
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # TensorRT-RTX only: contexts then never allocate, so that they can be captured in a graph.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if recipe.target.startswith("sm_"):
        config.num_compute_capabilities = 1
        capability = recipe.target.upper().replace("_", "")
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    if recipe.builder_optimization_level is not None:
        config.builder_optimization_level = recipe.builder_optimization_level
    if recipe.timing_cache is not None:
        load_timings(config, recipe.timing_cache)
    return config


def _profile(builder: Any, recipe: Recipe, rows: Rows) -> Any:
    profile = builder.create_optimization_profile()
    for spec in recipe.inputs:
        if spec.row_axis is not None:
            profile.set_shape(spec.name, *spec.profile(rows))
    return profile


def _why_not_compiled(recipe: Recipe, errors: Sequence[str]) -> StgTrtError:
    if lacks_memory(errors):
        return OutOfDeviceMemory(
            f"{recipe.segment}: expected enough free GPU memory to try {recipe.backend}'s kernels in, got "
            f"{errors[0]}: free some, use fewer frames, a smaller size or a smaller --max-batch"
        )
    return GateMissed(
        f"{recipe.segment}: {recipe.backend} cannot compile it: {'; '.join(errors[:3])}: "
        "look at the graph with --keep-onnx"
    )


def _activation_bytes(log: Sequence[str]) -> int | None:
    """What the builder only tells its log."""
    found = [match for message in log if (match := _ACTIVATION.search(message))]
    return int(found[-1][1]) if found else None


def _stream_plan(trt: Any, builder: Any, network: Any, config: Any, path: Path) -> bool:
    """Builds into a file: in memory the plan would be a second copy of the weights. False if it fails."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """`error` is what stopped it: exceptions may not pass through the builder."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            left = memoryview(data)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError as error:
                self.error = error
            return len(data) - len(left)

    # Unbuffered, so that a full disk shows while the writer can say so.
    with path.open("wb", buffering=0) as file:
        writer = Writer()
        is_built = bool(builder.build_serialized_network_to_stream(network, config, writer))
    if writer.error is not None:
        raise writer.error
    return is_built


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
