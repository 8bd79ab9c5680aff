"""The kernels of a step, one entry each: what runs, what it must move, how far it is from float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stg_trt.device import Device
from stg_trt.families.base import keep_attention_spec
from stg_trt.guidance import Guidance, combined
from stg_trt.guided_step import StepState, guided_step
from stg_trt.kernels import GuidedStepKernel, load_kernels
from stg_trt.solver import SolverTable
from stg_trt.step_plan import GROUPS
from stg_trt.step_runner import StepBuffers
from stg_trt.step_table import StepTable
from stg_trt.tensor_spec import ROWS, TensorSpec

from .clock import Work

CUDA_KERNEL, REFERENCE = "CUDA kernel", "torch reference"

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
    return Case(REFERENCE if kernels is None else CUDA_KERNEL, Work(run, reset), moved, error)


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
