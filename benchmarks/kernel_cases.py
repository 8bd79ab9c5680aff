"""The kernels of a step, one entry each: what runs, what it must move, how far it is from float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stg_trt.guidance.combine import combine
from stg_trt.guidance.resolved import ResolvedGuidance
from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.families.keep_flags import keep_attention_spec
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.runtime.device import Device
from stg_trt.runtime.kernels.operations import KernelOperations
from stg_trt.runtime.kernels.qk_norm_rope import Norm, QKNormRopeKernel, Rope, norm_rope
from stg_trt.runtime.state import RunSize, StepBuffers, StepState
from stg_trt.runtime.step_key import StepKey

from .clock import Work

CUDA_KERNEL, REFERENCE = "CUDA kernel", "torch reference"

_STEPS = 4
_PASSES = 3
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


def _guided_step(
    elements: int, device: Device, *, rescaled: bool = True, cfg_zero_star: bool = False
) -> Case:
    """guided_step over three rows: rescale reads all of them once more, CFG-Zero* reads uncond and cond."""
    guidance, solver = _tables(rescaled, cfg_zero_star)
    state = _state(elements, device)
    start = state.latents.clone()
    state.table.load(guidance, solver)
    step = device.operations.guided_step(state, StepKey.of(guidance, solver, 0))

    def reset() -> None:
        state.start(start)
        state.table.go_to(0)

    with device.scope():
        reset()
        expected = _stepped(state, guidance, solver)
        step(device.stream)
        error = float((state.latents.double() - expected).abs().max() / expected.abs().max())
    row_bytes = elements * state.buffers.view("pred").element_size()
    rows_read = _PASSES * (2 if rescaled else 1) + (2 if cfg_zero_star else 0)
    moved = rows_read * row_bytes + 2 * elements * state.latents.element_size()
    return Case(_implementation(device), Work(lambda: step(device.stream), reset), moved, error)


def _fan_out_rows(elements: int, device: Device) -> Case:
    """fan_out_rows to three rows."""
    guidance, solver = _tables()
    state = _state(elements, device)
    state.table.load(guidance, solver)
    fan_out = device.operations.fan_out_rows(state, range(_PASSES))
    rows = state.buffers.view("latents")
    with device.scope():
        fan_out(device.stream)
        expected = (state.latents.double() * solver.input_scale[0]).to(rows.dtype)
        error = _relative(rows, expected.expand_as(rows))
    moved = elements * (state.latents.element_size() + _PASSES * rows.element_size())
    return Case(_implementation(device), Work(lambda: fan_out(device.stream)), moved, error)


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
    if isinstance(device.operations, KernelOperations):
        kernel = QKNormRopeKernel(device.operations.kernels, (q, k), outputs, norms, rope)
        run = lambda: kernel.enqueue(device.stream)  # noqa: E731
    else:

        def run() -> None:
            for x, norm, out in zip((q, k), norms, outputs, strict=True):
                out.copy_(norm_rope(x, norm, rope))

    with device.scope():
        run()
        error = max(
            _relative(out, _norm_rope(x, norm, rope).to(dtype))
            for x, norm, out in zip((q, k), norms, outputs, strict=True)
        )
    moved = 4 * q.numel() * q.element_size() + 2 * rope.cos.numel() * rope.cos.element_size()
    return Case(_implementation(device), Work(run), moved, error)


def _implementation(device: Device) -> str:
    return CUDA_KERNEL if isinstance(device.operations, KernelOperations) else REFERENCE


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


def _tables(rescaled: bool = True, cfg_zero_star: bool = False) -> tuple[Guidance, SolverTable]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    solver = SolverTable.from_scheduler(FlowMatchEulerDiscreteScheduler(), _STEPS)
    guidance = Guidance.for_steps(
        [0.0] * _STEPS,
        ResolvedGuidance(
            guidance_scale=3.0,
            stg_scale=1.0,
            rescale=0.7 if rescaled else 0.0,
            stg_blocks=[0],
            cfg_zero_star=cfg_zero_star,
        ),
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

    size = RunSize(videos=1, steps=_STEPS, single_step=True, noises=0)
    state = StepState.allocate(StepBuffers(specs, frozenset(), 1, place), (1, elements), size)
    state.start(random(1, elements))
    state.buffers.view("pred").copy_(random(_PASSES, elements) + 1)
    return state


def _stepped(state: StepState, guidance: Guidance, solver: SolverTable) -> Tensor:
    """The first step in float64."""
    pred = combine(
        state.buffers.view("pred").double().unflatten(0, (_PASSES, 1)),
        torch.tensor(guidance.weights(0), dtype=torch.float64, device=state.latents.device),
        cond=1,
        rescale=guidance.rescale[0],
        zero_star=0 if guidance.cfg_zero_star else None,
    )
    factors = solver.single_step[0]
    assert factors is not None
    return state.latents.double() * factors[0] + pred * factors[1]


KERNELS = (
    Kernel("fan_out_rows", _fan_out_rows),
    Kernel("qk_norm_rope", _qk_norm_rope),
    Kernel("guided_step", _guided_step),
    Kernel("guided_step, no rescale", partial(_guided_step, rescaled=False)),
    Kernel("guided_step, CFG-Zero*", partial(_guided_step, cfg_zero_star=True)),
)
