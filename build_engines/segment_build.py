"""One segment from weights to engine files, stage by stage, freeing each stage's memory."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stg_trt.engines.key import EngineKey, digest
from stg_trt.engines.manifest import FileRecord, SegmentRecord, Verification
from stg_trt.engines.reused import Reused
from stg_trt.errors import GateMissed
from stg_trt.models.segment import Segment
from stg_trt.system.files import file_sha256

from .compiler import Compiled, Compiler, Exported, Job, Run, SegmentExport
from .memory import PeakMemory, release_growth
from .options import BuildOptions
from .pieces import label_of, pieces_of
from .progress import Progress
from .reference import Reference
from .reusable_files import ReusableFiles
from .streamed_model import State
from .verify import verify, worst

_log = logging.getLogger(__name__)


class SegmentBuild:
    """Exports a segment once, when the first target asks for it; then compiles per target.

    Its numerics are verified on each piece as it is exported, where the engines compute the same, else on the
    whole segment per target.
    """

    def __init__(
        self,
        options: BuildOptions,
        compiler: Compiler,
        segment: Segment,
        reference: Reference,
        work: Path,
        progress: Progress,
    ) -> None:
        self.options = options
        self.compiler = compiler
        self.segment = segment
        self.reference = reference
        self.progress = progress
        family, workload = options.checkpoint.family, options.workload
        self._job = Job(
            segment,
            tuple(family.inputs(segment, workload)),
            tuple(family.outputs(segment, workload)),
            options.rows(segment),
            work,
            lambda phase: progress.stage(segment, phase),
        )
        self._shared_seconds: dict[str, float] = {}
        self._shared_peak = 0
        self._exported: Exported | None = None
        self._verification: tuple[Verification, ...] = ()
        self._states: tuple[list[State], list[State]] = [], []

    def compile(self, key: EngineKey, finished: ReusableFiles) -> SegmentRecord:
        """The engine for one target, in its folder; raises GateMissed and leaves nothing if a gate fails."""
        exported = self._exported = self._exported or self._export()
        seconds = dict(self._shared_seconds)
        with PeakMemory() as peak:
            with self._timed("compile", seconds):
                compiled = self.compiler.compile(self._job, exported, key.target, finished)
            release_growth()
            self._check(compiled)
            verification = self._verification
            if compiled.runner is not None:
                with self._timed("verify", seconds):
                    verification = self._verify(self.segment.name, compiled.runner, *self._states)
        family, workload = self.options.checkpoint.family, self.options.workload
        facts = {**key.facts(), "graph_sha256": exported.sha256}
        return SegmentRecord(
            segment=self.segment,
            inputs=key.inputs,
            outputs=key.outputs,
            key=digest(facts),
            facts=facts,
            files=tuple(_publish(path, finished.folder) for path in compiled.files),
            graph_sha256=exported.sha256,
            flops=family.segment_flops(self.segment, workload),
            attentions=family.attentions(self.segment),
            fused_attentions=compiled.fused_attentions,
            attention_kernels=compiled.attention_kernels,
            activation_bytes=compiled.activation_bytes,
            verification=verification,
            commands=compiled.commands,
            seconds=seconds,
            peak_bytes=max(self._shared_peak, peak.bytes),
            reused=_reused(exported, compiled),
            structure_sha256=compiled.structure_sha256,
        )

    def _export(self) -> Exported:
        seconds = self._shared_seconds
        with PeakMemory() as peak:
            export = self.compiler.export(self._job)
            with self._timed("reference", seconds):
                inputs = self.reference.inputs(self.segment)
            checks = {label_of(piece): self._append(piece, export) for piece in pieces_of(self.segment)}
            self._verification = worst(checks)
            self._states = inputs, self.reference.outputs(self.segment)
            with self._timed("export", seconds):
                exported = export.finish()
        release_growth()
        self._shared_peak = peak.bytes
        return exported

    def _append(self, piece: Segment, export: SegmentExport) -> tuple[Verification, ...]:
        """Exports the next piece, with no other weights in memory; how far it is from eager float32."""
        seconds = self._shared_seconds
        release_growth()
        with self._timed("reference", seconds):
            module = self.reference.module(piece, expand_masks=self.compiler.expand_masks)
            inputs, expected = self.reference.run(piece, module)
        with self._timed("export", seconds):
            dtype = getattr(torch, self.options.workload.dtype)
            self.options.checkpoint.family.lower_precision(module, dtype)
            load = export.append(piece, module)
        if load is None:
            return ()
        with self._timed("verify", seconds):
            return self._verify(f"{self.segment.name}, {label_of(piece)}", load, inputs, expected)

    def _verify(
        self, name: str, load: Callable[[], Run], inputs: list[State], expected: list[State]
    ) -> tuple[Verification, ...]:
        """How far what is loaded is from eager float32, at each timestep; GateMissed beyond the limit."""
        timesteps = self.reference.timesteps
        return verify(name, load(), timesteps, inputs, expected, self.compiler.tolerance) if timesteps else ()

    def _check(self, compiled: Compiled) -> None:
        """The gates on the compiled segment."""
        family, segment = self.options.checkpoint.family, self.segment
        wanted = family.attentions(segment)
        if compiled.fused_attentions not in (None, wanted):
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
        seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 3)
        _log.info("%s: %s has taken %.1f s", self.segment.name, stage, seconds[stage])


def _reused(exported: Exported, compiled: Compiled) -> tuple[Reused, ...]:
    taken: dict[Reused, bool] = {"graph": exported.reused, "engine": compiled.refitted}
    return tuple(name for name, is_taken in taken.items() if is_taken)


def _publish(path: Path, folder: Path) -> FileRecord:
    """Moves a finished file into the build folder, durable before its name is; one that is there stays."""
    if path.parent != folder:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    record = FileRecord(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))
    if path.parent != folder:
        path.replace(folder / path.name)
    return record
