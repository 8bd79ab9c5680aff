"""One segment from weights to an engine file, stage by stage, freeing each stage's memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stg_trt import manifest as manifests
from stg_trt.engine_key import EngineKey, digest
from stg_trt.errors import GateMissed
from stg_trt.manifest import FileRecord, SegmentRecord, Verification
from stg_trt.segment import Segment

from .compile_onnxruntime import compile_onnxruntime
from .compile_tensorrt import compile_tensorrt
from .compiled import Compiled
from .export import export, files_of
from .memory import PeakMemory, release
from .options import BuildOptions
from .progress import Progress
from .reference import Reference
from .verify import verify
from .widen import widen


class SegmentBuild:
    """Exports and verifies a segment once, when the first target asks for it; then compiles per target."""

    def __init__(
        self, options: BuildOptions, segment: Segment, reference: Reference, work: Path, progress: Progress
    ) -> None:
        self.options = options
        self.segment = segment
        self.reference = reference
        self.graph = work / f"{segment.name}.onnx"
        self.progress = progress
        self._shared_seconds: dict[str, float] = {}
        self._shared_peak = 0
        self._verification: tuple[Verification, ...] = ()
        self._onnx_sha256 = ""

    def compile(self, key: EngineKey, folder: Path) -> SegmentRecord:
        """The engine for one target, in `folder`; raises GateMissed and leaves nothing where a gate fails."""
        if not self._onnx_sha256:
            self._export_and_verify()
        seconds = dict(self._shared_seconds)
        with PeakMemory() as peak, self._timed("compile", seconds):
            compiled = self._compile(key)
        release()
        self._check(compiled)
        family, workload = self.options.checkpoint.family, self.options.workload
        facts = {**key.facts(), "onnx_sha256": self._onnx_sha256}
        return SegmentRecord(
            segment=self.segment,
            inputs=key.inputs,
            outputs=key.outputs,
            key=digest(facts),
            facts=facts,
            files=tuple(_publish(path, folder) for path in compiled.files),
            onnx_sha256=self._onnx_sha256,
            flops=family.segment_flops(self.segment, workload),
            attentions=family.attentions(self.segment),
            fused_attentions=compiled.fused_attentions,
            activation_bytes=compiled.activation_bytes,
            verification=self._verification,
            seconds=seconds,
            peak_bytes=max(self._shared_peak, peak.bytes),
        )

    def _export_and_verify(self) -> None:
        options, seconds = self.options, self._shared_seconds
        with PeakMemory() as peak:
            with self._timed("reference", seconds):
                module = self.reference.module(self.segment, expand_masks=options.backend.expand_masks)
                inputs = self.reference.inputs(self.segment)
                expected = self.reference.run(self.segment, module)
            with self._timed("export", seconds):
                specs = options.checkpoint.family.inputs(self.segment, options.workload)
                options.checkpoint.family.lower_precision(module, getattr(torch, options.workload.dtype))
                release()
                export(
                    module,
                    specs,
                    self.graph,
                    opset=options.backend.opset,
                    max_rows=options.rows(self.segment)[2],
                )
            del module
            release()
            with self._timed("verify", seconds):
                if self.reference.timesteps:
                    self._verification = verify(
                        self.segment.name, self._runnable(), self.reference.timesteps, inputs, expected
                    )
        release()
        self._shared_peak = peak.bytes
        self._onnx_sha256 = digest({path.name: manifests.file_sha256(path) for path in files_of(self.graph)})

    def _runnable(self) -> Path:
        """The graph as ONNX Runtime's CPU provider can run it."""
        if self.options.workload.precision == "fp32":
            return self.graph
        widened = self.graph.with_name(f"{self.graph.stem}.float32.onnx")
        widen(self.graph, widened)
        return widened

    def _compile(self, key: EngineKey) -> Compiled:
        if key.backend == "onnxruntime":
            return compile_onnxruntime(self.graph)
        return compile_tensorrt(
            self.graph,
            key.inputs,
            key.rows,
            backend=key.backend,
            target=key.target,
            on_progress=lambda phase: self.progress.stage(self.segment, f"compile for {key.target}: {phase}"),
        )

    def _check(self, compiled: Compiled) -> None:
        """The gates on the compiled segment."""
        family, segment = self.options.checkpoint.family, self.segment
        wanted = family.attentions(segment)
        if compiled.fused_attentions != wanted:
            raise GateMissed(
                f"{segment.name}: expected {wanted} fused attentions, got {compiled.fused_attentions}: "
                "an attention of this segment was decomposed (its mask, dtype or head size has no kernel)"
            )
        rows = self.options.rows(segment)[2]
        limit = family.activation_limit(segment, self.options.workload, rows)
        if compiled.activation_bytes is not None and compiled.activation_bytes > limit:
            raise GateMissed(
                f"{segment.name}: expected at most {limit} bytes of activations for {rows} rows, got "
                f"{compiled.activation_bytes}: memory grows with the square of the tokens"
            )

    @contextmanager
    def _timed(self, stage: str, seconds: dict[str, float]) -> Iterator[None]:
        self.progress.stage(self.segment, stage)
        start = time.perf_counter()
        yield
        seconds[stage] = round(time.perf_counter() - start, 3)


def _publish(path: Path, folder: Path) -> FileRecord:
    """Moves a finished file into the build folder, durable before its name is."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    record = FileRecord(name=path.name, bytes=path.stat().st_size, sha256=manifests.file_sha256(path))
    path.replace(folder / path.name)
    return record
