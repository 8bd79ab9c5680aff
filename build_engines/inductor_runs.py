"""Runs of a finished inductor engine for the gates, on the device it is for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from stg_trt.engines.inductor import InductorContext, InductorEngine, Scratch
from stg_trt.errors import GateMissed
from stg_trt.models.segment import engine_outputs
from stg_trt.system.stream import Stream

from .compiler import CPU, Job


class KernelRefused(GateMissed):
    """A compiled engine that raises when it runs: a kernel does not take its sizes."""


class InductorRuns:
    """One engine, loaded from its files when it is first run."""

    def __init__(self, job: Job, files: Sequence[Path], stream: Stream) -> None:
        self._job = job
        self._files = files
        self._stream = stream

    def run(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Outputs in order, on the CPU; raises KernelRefused if one refuses to run."""
        with self._scope():
            context, outputs = self._bound(inputs)
            context.enqueue(self._stream.stream)
            return [output.to(CPU) for output in outputs]

    def activation_bytes(self) -> int | None:
        """Memory that a run at the most rows takes on a GPU; None on a CPU, where torch does not count it."""
        if self._stream.torch_device.type != "cuda":
            return None
        generator = torch.Generator().manual_seed(0)
        inputs = {spec.name: spec.random(self._job.rows[2], generator) for spec in self._job.inputs}
        with self._scope():
            context, _ = self._bound(inputs)
            # The first run also allocates what stays.
            context.enqueue(self._stream.stream)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            context.enqueue(self._stream.stream)
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    @cached_property
    def _engine(self) -> InductorEngine:
        device = self._stream.torch_device
        return InductorEngine(self._files, device, Scratch(device))

    @contextmanager
    def _scope(self) -> Iterator[None]:
        with self._stream.scope():
            try:
                yield
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise KernelRefused(
                    f"{self._job.segment.name}: the compiled engine cannot run: {reason}"
                ) from error

    def _bound(self, inputs: dict[str, Tensor]) -> tuple[InductorContext, list[Tensor]]:
        """A context over copies of the inputs, and its outputs, not-a-number until they are written."""
        engine, job = self._engine, self._job
        context = engine.context()
        rows = next(len(inputs[spec.name]) for spec in job.inputs if spec.has_rows)
        for spec in job.inputs:
            # A copy in any case: what is given may be a part of a tensor, anywhere in memory.
            tensor = inputs[spec.name].to(engine.device, spec.torch_dtype, copy=True)
            context.bind(spec.name, tensor.contiguous())
        outputs = []
        names = engine_outputs(tuple(s.name for s in job.inputs), tuple(s.name for s in job.outputs))
        for name, spec in zip(names, job.outputs, strict=True):
            shape = spec.with_rows(rows)
            output = torch.full(shape, float("nan"), dtype=spec.torch_dtype, device=engine.device)
            outputs.append(output)
            context.bind(name, output)
        return context, outputs
