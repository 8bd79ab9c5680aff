"""One segment from weights to engine files, stage by stage, freeing each stage's memory."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stg_trt.engines.key import EngineKey, digest
from stg_trt.engines.manifest import FileRecord, SegmentRecord, Verification
from stg_trt.errors import GateMissed
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import Segment
from stg_trt.system.files import file_sha256

from .compiler import Compiled, Compiler, Exported, Job, Run
from .memory import PeakMemory, release_growth
from .options import BuildOptions
from .pieces import pieces_of
from .progress import Progress
from .reference import Reference, State
from .reusable_files import ReusableFiles
from .verify import verify

_log = logging.getLogger(__name__)


class SegmentBuild:
    """Exports a segment once, when the first target asks for it; then compiles per target.

    Its numerics are verified on what was exported where the engines compute the same, else per target.
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
                    verification = self._verify(compiled.runner)
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
        )

    def _export(self) -> Exported:
        seconds = self._shared_seconds
        with PeakMemory() as peak:
            with self._timed("reference", seconds):
                module = self.reference.module(self.segment, expand_masks=self.compiler.expand_masks)
                inputs = self.reference.inputs(self.segment)
                self._states = inputs, self.reference.run(self.segment, module)
            with self._timed("export", seconds):
                modules = self._modules(module)
                # From here on the generator alone holds the module, and gives it up for the next piece.
                del module
                exported = self.compiler.export(self._job, modules)
                modules.close()
            release_growth()
            if exported.runner is not None:
                with self._timed("verify", seconds):
                    self._verification = self._verify(exported.runner)
        release_growth()
        self._shared_peak = peak.bytes
        return exported

    def _modules(self, module: SegmentModule) -> Generator[tuple[Segment, SegmentModule]]:
        """The segment's pieces with their weights in the engine's precision, one in memory at a time."""
        dtype = getattr(torch, self.options.workload.dtype)
        for piece in pieces_of(self.segment):
            if piece != self.segment:
                module = self.reference.module(piece, expand_masks=self.compiler.expand_masks)
            self.options.checkpoint.family.lower_precision(module, dtype)
            release_growth()
            yield piece, module

    def _verify(self, runner: Callable[[], Run]) -> tuple[Verification, ...]:
        timesteps = self.reference.timesteps
        if not timesteps:
            return ()
        return verify(self.segment.name, runner(), timesteps, *self._states, self.compiler.tolerance)

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
        seconds[stage] = round(time.perf_counter() - start, 3)
        _log.info("%s: %s took %.1f s", self.segment.name, stage, seconds[stage])


def _publish(path: Path, folder: Path) -> FileRecord:
    """Moves a finished file into the build folder, durable before its name is; one that is there stays."""
    if path.parent != folder:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    record = FileRecord(name=path.name, bytes=path.stat().st_size, sha256=file_sha256(path))
    if path.parent != folder:
        path.replace(folder / path.name)
    return record
