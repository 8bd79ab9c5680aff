"""The kernels of a step, one entry each: what runs, what it must move, how far it is from float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stg_trt.guidance.combine import combined
from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.families.base import keep_attention_spec
from stg_trt.models.plan import GROUPS
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.runtime.device import Device
from stg_trt.runtime.guided_step import fan_out_rows, guided_step
from stg_trt.runtime.kernels.fan_out_rows import FanOutRowsKernel
from stg_trt.runtime.kernels.guided_step import GuidedStepKernel
from stg_trt.runtime.kernels.qk_norm_rope import Norm, QKNormRopeKernel, Rope, norm_rope
from stg_trt.runtime.kernels.shared_library import kernels_for
from stg_trt.runtime.state import StepBuffers, StepState
from stg_trt.runtime.table import StepTable

from .clock import Work

CUDA_KERNEL, REFERENCE = "CUDA kernel", "torch reference"

_STEPS = 4
_WIDTH = 2048
_DTYPE = {"cuda": "bfloat16", "cpu": "float32"}


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
    kernels = kernels_for(device.torch_device)
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


def _fan_out_rows(elements: int, device: Device) -> Case:
    """fan_out_rows to three rows."""
    guidance, solver = _tables(rescaled=True)
    state = _state(elements, device)
    state.table.load(guidance, solver)
    kernels = kernels_for(device.torch_device)
    if kernels is None:
        run = lambda: fan_out_rows(state, GROUPS)  # noqa: E731
    else:
        kernel = FanOutRowsKernel(kernels, state, GROUPS)
        run = lambda: kernel.enqueue(device.stream)  # noqa: E731
    rows = state.buffers.view("latents")
    with device.scope():
        run()
        expected = (state.latents.double() * solver.input_scale[0]).to(rows.dtype)
        error = _relative(rows, expected.expand_as(rows))
    moved = elements * (state.latents.element_size() + len(GROUPS) * rows.element_size())
    return Case(REFERENCE if kernels is None else CUDA_KERNEL, Work(run), moved, error)


def _qk_norm_rope(elements: int, device: Device) -> Case:
    """QK norm and rotary embedding of one video's tokens, of LTX-Video 2B's width."""
    place, dtype = device.torch_device, getattr(torch, _DTYPE[device.torch_device.type])
    shape = (1, max(1, elements // _WIDTH), _WIDTH)
    generator = torch.Generator(place).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=place)

    q, k = random(*shape).to(dtype), random(*shape).to(dtype)
    norms = Norm(random(_WIDTH)), Norm(random(_WIDTH))
    rope = Rope(*(random(shape[1], _WIDTH // 2) for _ in range(2)))
    outputs = torch.empty_like(q), torch.empty_like(k)
    kernels = kernels_for(place)
    if kernels is None:

        def run() -> None:
            for x, norm, out in zip((q, k), norms, outputs, strict=True):
                out.copy_(norm_rope(x, norm, rope))
    else:
        kernel = QKNormRopeKernel(kernels, (q, k), outputs, norms, rope)
        run = lambda: kernel.enqueue(device.stream)  # noqa: E731
    with device.scope():
        run()
        error = max(
            _relative(out, _norm_rope(x, norm, rope).to(dtype))
            for x, norm, out in zip((q, k), norms, outputs, strict=True)
        )
    moved = 4 * q.numel() * q.element_size() + 2 * rope.cos.numel() * rope.cos.element_size()
    return Case(REFERENCE if kernels is None else CUDA_KERNEL, Work(run), moved, error)


def _norm_rope(x: Tensor, norm: Norm, rope: Rope) -> Tensor:
    """RMS norm over all channels, then the rotation of neighbouring pairs, in float64."""
    normed = (
        x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + norm.eps) * norm.weight.double()
    )
    a, b = normed[..., 0::2], normed[..., 1::2]
    cos, sin = rope.cos.double(), rope.sin.double()
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def _relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value; of a lower precision, beyond one rounding."""
    difference = (got.double() - expected.double()).abs()
    # A value near the middle of two may be rounded to either.
    slack = expected.double().abs() * 2 * torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 0.0
    return float((difference - slack).clamp_min(0).max() / expected.double().abs().max())


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
    specs = [
        TensorSpec("latents", _DTYPE[place.type], (ROWS, elements)),
        TensorSpec("timestep", "float32", (ROWS,)),
        TensorSpec("pred", _DTYPE[place.type], (ROWS, elements)),
        keep_attention_spec(),
    ]
    generator = torch.Generator(place).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=place)

    latents = random(1, elements)
    state = StepState(
        buffers=StepBuffers(specs, frozenset(), 1, place),
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
    Kernel("fan_out_rows", _fan_out_rows),
    Kernel("qk_norm_rope", _qk_norm_rope),
    Kernel("guided_step", lambda elements, device: _guided_step(elements, device, rescaled=True)),
    Kernel(
        "guided_step, no rescale", lambda elements, device: _guided_step(elements, device, rescaled=False)
    ),
)
