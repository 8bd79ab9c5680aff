"""Runs of a finished inductor engine for the gates, on the device it is for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stg_trt.backends.inductor import InductorContext, InductorEngine, Scratch
from stg_trt.device import Device
from stg_trt.segment import engine_outputs

from .compiler import CPU, Job, Run


def engine_runner(job: Job, files: Sequence[Path], device: Device) -> Run:
    """Loads the engine from its files."""
    engine = InductorEngine(files, device.torch_device, Scratch(device.torch_device))

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        with device.scope():
            context, outputs = _bound(engine, job, inputs)
            context.enqueue(device.stream)
            return [output.to(CPU) for output in outputs]

    return run


def activation_bytes(job: Job, files: Sequence[Path], device: Device) -> int | None:
    """Memory that a run at the most rows takes on the GPU; None on the CPU, where torch does not count it."""
    if device.torch_device.type != "cuda":
        return None
    engine = InductorEngine(files, device.torch_device, Scratch(device.torch_device))
    generator = torch.Generator().manual_seed(0)
    inputs = {spec.name: spec.random(job.rows[2], generator) for spec in job.inputs}
    with device.scope():
        context, _ = _bound(engine, job, inputs)
        # The first run also allocates what stays.
        context.enqueue(device.stream)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        context.enqueue(device.stream)
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _bound(
    engine: InductorEngine, job: Job, inputs: dict[str, Tensor]
) -> tuple[InductorContext, list[Tensor]]:
    """A context over copies of the inputs, and its outputs, not-a-number until they are written."""
    context = engine.context()
    rows = next(len(inputs[spec.name]) for spec in job.inputs if spec.has_rows)
    for spec in job.inputs:
        context.bind(spec.name, inputs[spec.name].to(engine.device, spec.torch_dtype).contiguous())
    outputs = []
    names = engine_outputs(tuple(s.name for s in job.inputs), tuple(s.name for s in job.outputs))
    for name, spec in zip(names, job.outputs, strict=True):
        shape = spec.with_rows(rows)
        output = torch.full(shape, float("nan"), dtype=spec.torch_dtype, device=engine.device)
        outputs.append(output)
        context.bind(name, output)
    return context, outputs
