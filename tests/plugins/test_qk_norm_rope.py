"""Norm and rotary embedding in one kernel, against the torch reference; the reference against diffusers."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stg_trt.runtime.kernels.qk_norm_rope import Norm, QKNormRopeKernel, Rope, norm_rope
from tests.support.compiled_kernels import Machine

# rows, tokens, channels, channels normed together, channels that the tables cover (0: no rotation).
SHAPES = {
    "all-channels": (2, 5, 2048, 2048, 2048),
    "ragged-channels": (2, 5, 1004, 1004, 1004),
    "heads": (3, 7, 3 * 128, 128, 128),
    "heads-with-their-own-tables": (2, 7, 3 * 64, 64, 3 * 64),
    "small-heads": (2, 300, 4 * 8, 8, 8),
    "heads-of-40": (2, 33, 4 * 40, 40, 40),
    "heads-of-12": (2, 9, 3 * 12, 12, 12),
    "no-rotation": (2, 5, 256, 64, 0),
    "most-channels": (1, 2, 8192, 8192, 128),
}
LARGE = ("all-channels", "small-heads", "most-channels")
SMALL = tuple(name for name in SHAPES if name not in LARGE)
TOLERANCES = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norms(group: int, device: torch.device, centred: bool) -> tuple[Norm, Norm]:
    def norm(seed: int) -> Norm:
        bias = random(group, seed=seed + 1).to(device) if centred else None
        return Norm(random(group, seed=seed).to(device), bias, eps=1e-3, centred=centred)

    return norm(10), norm(20)


def rope(tokens: int, channels: int, device: torch.device) -> Rope | None:
    if channels == 0:
        return None
    return Rope(*(random(tokens, channels // 2, seed=seed).to(device) for seed in (30, 40)))


def shifted(tensor: Tensor, by: int) -> Tensor:
    """The same values at an address that is no longer aligned to vectors."""
    memory = torch.full((tensor.numel() + by,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    return memory[by:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(
    ("shape", "dtype", "centred", "in_place", "shift"),
    [
        *product(SMALL, TOLERANCES, [False, True], [False, True], [0, 1]),
        # Each of two values of the last three in one of the cases of a shape and dtype.
        *((*case, False, False, 0) for case in product(LARGE, TOLERANCES)),
        *((*case, True, True, 1) for case in product(LARGE, TOLERANCES)),
    ],
)
def test_kernel_equals_the_reference(
    machine: Machine, shape: str, dtype: str, centred: bool, in_place: bool, shift: int
) -> None:
    rows, tokens, channels, group, table = SHAPES[shape]

    def made(seed: int) -> Tensor:
        values = 3 * random(rows, tokens, channels, seed=seed) + 1
        return shifted(values.to(machine.device, getattr(torch, dtype)), shift)

    inputs = made(1), made(2)
    norm, tables = norms(group, machine.device, centred), rope(tokens, table, machine.device)
    expected = [norm_rope(x, side, tables) for x, side in zip(inputs, norm, strict=True)]
    empty = torch.full_like(inputs[0], torch.nan), torch.full_like(inputs[1], torch.nan)
    outputs = inputs if in_place else empty
    kernel = QKNormRopeKernel(machine.kernels, inputs, outputs, norm, tables)
    machine.enqueue(kernel)
    for got, wanted in zip(outputs, expected, strict=True):
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(got.float(), wanted.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("group", [12, 24])
def test_the_reference_is_torchs_norm_and_diffusers_rotation(group: int) -> None:
    from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

    x, weight = random(2, 5, 24, seed=1), random(group, seed=2)
    angles = random(5, 12, seed=3)
    tables = Rope(angles.cos(), angles.sin())
    normed = F.rms_norm(x.unflatten(-1, (-1, group)), (group,), weight, 1e-6).flatten(-2)
    both = (table.repeat_interleave(2, dim=1)[None] for table in (tables.cos, tables.sin))
    expected = apply_rotary_emb(normed, tuple(both))
    torch.testing.assert_close(norm_rope(x, Norm(weight), tables), expected)


def test_the_reference_of_a_layer_norm_per_head() -> None:
    x, weight, bias = random(2, 5, 24, seed=1), random(12, seed=2), random(12, seed=3)
    expected = F.layer_norm(x.unflatten(-1, (-1, 12)), (12,), weight, bias, 1e-6).flatten(-2)
    torch.testing.assert_close(norm_rope(x, Norm(weight, bias, centred=True), None), expected)
