"""The kernels of a step against a plain copy: verified in float64, then timed by the bytes they must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stg_trt.device import Device, open_device
from stg_trt.errors import GateMissed
from stg_trt.families.base import keep_attention_spec
from stg_trt.guidance import Guidance, combined
from stg_trt.guided_step import StepState, guided_step
from stg_trt.kernels import GuidedStepKernel, load_kernels
from stg_trt.solver import SolverTable
from stg_trt.step_plan import GROUPS
from stg_trt.step_runner import StepBuffers
from stg_trt.step_table import StepTable
from stg_trt.tensor_spec import ROWS, TensorSpec

from . import record
from .clock import Work, alternate
from .launches import count_launches

LTX_ELEMENTS = 128 * 5280
"""Latents of LTX-Video at 704x480x121: channels times tokens."""

_REFERENCE = "torch reference"
_COPY = "copy"
_MAX_RELATIVE = 1e-5
_STEPS = 4
_PRED_DTYPE = {"cuda": "bfloat16", "cpu": "float32"}


@dataclass(frozen=True)
class Case:
    """One kernel on one size: what runs, how many bytes it reads and writes, how far off it is."""

    implementation: str
    work: Work
    bytes: int
    error: float


@dataclass(frozen=True)
class Kernel:
    """An entry of the table; `make` verifies, so that `error` is known before anything is timed."""

    name: str
    make: Callable[[int, Device], Case]


@dataclass(frozen=True)
class KernelBenchmark:
    """Every kernel on every number of latent elements, beside a copy of as many bytes."""

    device: str
    elements: tuple[int, ...]
    rounds: int

    def run(self, output: Path) -> None:
        """Verifies, times, prints a table and writes the JSON, which grows with every size."""
        device = open_device(self.device)
        results = record.Record(output, "kernels", rounds=self.rounds, kernels=[])
        for elements in self.elements:
            cases = {kernel.name: kernel.make(elements, device) for kernel in KERNELS}
            for name, case in cases.items():
                if not case.error <= _MAX_RELATIVE:
                    raise GateMissed(
                        f"{name}: expected {case.implementation} within a relative {_MAX_RELATIVE} of "
                        f"float64, got {case.error:.1e}: do not trust timings of it"
                    )
            rows = [self._timed(name, case, elements, device) for name, case in cases.items()]
            results.add(kernels=[*results.result["kernels"], *rows])
        results.finish()
        _print(results.result)

    def _timed(self, name: str, case: Case, elements: int, device: Device) -> dict[str, Any]:
        times = alternate({name: case.work, _COPY: _copy(case.bytes, device)}, self.rounds, device)
        seconds, copy_s = median(times[name].device_s), median(times[_COPY].device_s)
        row: dict[str, Any] = {
            "name": name,
            "implementation": case.implementation,
            "elements": elements,
            "bytes": case.bytes,
            "relative_error": case.error,
            **record.percentiles(times[name].device_s),
            "gb_per_s": round(case.bytes / seconds / 1e9, 2),
            "copy_gb_per_s": round(case.bytes / copy_s / 1e9, 2),
            "share_of_copy": round(copy_s / seconds, 4),
        }
        if device.torch_device.type == "cuda":
            row |= count_launches(case.work, device).to_json()
        return row


def _copy(size: int, device: Device) -> Work:
    """A copy that reads half of `size` bytes and writes as many."""
    source, target = (torch.ones(size // 2, dtype=torch.uint8, device=device.torch_device) for _ in range(2))
    return Work(lambda: (target.copy_(source), None)[1])


def _guided_step(elements: int, device: Device, *, rescaled: bool) -> Case:
    """guided_step over three rows: with rescale the statistics read the rows once more."""
    guidance, solver = _tables(rescaled)
    state = _state(elements, device)
    start = state.latents.clone()
    state.table.load(guidance, solver)
    kernels = load_kernels() if device.torch_device.type == "cuda" else None
    options = {"rescaled": rescaled, "two_term": True}

    def reset() -> None:
        state.start(start)
        state.table.counter.zero_()

    if kernels is None:
        run = lambda: guided_step(state, GROUPS, **options, cfg_zero_star=False)  # noqa: E731
    else:
        kernel = GuidedStepKernel(kernels, state, GROUPS, **options)
        run = lambda: kernel.enqueue(device.stream)  # noqa: E731
    with device.scope():
        reset()
        expected = _stepped(state, guidance, solver)
        run()
        error = float((state.latents.double() - expected).abs().max() / expected.abs().max())
    row_bytes = elements * state.buffers.view("pred").element_size()
    moved = len(GROUPS) * row_bytes * (2 if rescaled else 1) + 2 * elements * state.latents.element_size()
    return Case(_REFERENCE if kernels is None else "CUDA kernel", Work(run, reset), moved, error)


def _tables(rescaled: bool) -> tuple[Guidance, SolverTable]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    solver = SolverTable.from_scheduler(FlowMatchEulerDiscreteScheduler(), _STEPS)
    guidance = Guidance.for_steps(
        [0.0] * _STEPS,
        guidance_scale=3.0,
        stg_scale=1.0,
        rescale=0.7 if rescaled else 0.0,
        stg_blocks=[0],
    )
    return guidance, solver


def _state(elements: int, device: Device) -> StepState:
    """One video's latents and predictions at random."""
    place = device.torch_device
    pred = TensorSpec("pred", _PRED_DTYPE[place.type], (ROWS, elements))
    generator = torch.Generator(place).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=place)

    latents = random(1, elements)
    state = StepState(
        buffers=StepBuffers([pred, keep_attention_spec()], frozenset(), 1, place),
        table=StepTable(_STEPS, place),
        latents=latents,
        initial=latents.clone(),
        history=None,
    )
    state.buffers.view("pred").copy_(random(len(GROUPS), elements) + 1)
    return state


def _stepped(state: StepState, guidance: Guidance, solver: SolverTable) -> Tensor:
    """The first step in float64."""
    uncond, cond, skip = state.buffers.view("pred").double().split(1)
    pred = combined(
        cond,
        uncond,
        skip,
        cfg_scale=guidance.cfg_scale[0],
        stg_scale=guidance.stg_scale[0],
        rescale=guidance.rescale[0] or None,
        cfg_zero_star=False,
    )
    factors = solver.two_term[0]
    assert factors is not None
    return state.latents.double() * factors[0] + pred * factors[1]


KERNELS = (
    Kernel("guided_step", lambda elements, device: _guided_step(elements, device, rescaled=True)),
    Kernel(
        "guided_step, no rescale", lambda elements, device: _guided_step(elements, device, rescaled=False)
    ),
)


def _print(result: dict[str, Any]) -> None:
    table = Table()
    for column in ("kernel", "implementation", "elements", "median ms", "GB/s", "of a copy"):
        table.add_column(column, justify="left" if column in ("kernel", "implementation") else "right")
    for row in result["kernels"]:
        table.add_row(
            row["name"],
            row["implementation"],
            f"{row['elements']:,}",
            f"{row['median_ms']:.3f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['share_of_copy']:.0%}",
        )
    Console().print(table)
