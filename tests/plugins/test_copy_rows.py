"""Several copies in one launch, against torch's."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from stg_trt.runtime.kernels.copy_rows import CopyRowsKernel, copy_rows
from tests.support.compiled_kernels import Machine

POISON = 0x5A
CHUNK_BYTES = 256 * 4 * 16
SHORT = [
    [0],
    [0, 5, 0, 16, 0],
    [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 100],
]
LONG = [
    [CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3, 5 * CHUNK_BYTES + 17],
    [50] * 67,
]


def pairs_in(memory: Tensor, source: Tensor, lengths: list[int], shift: int) -> list[tuple[Tensor, Tensor]]:
    """Slices of (destination, source) bytes, far enough apart to see what is written between them."""
    pairs, start = [], 0
    for i, length in enumerate(lengths):
        to, origin = start + (7 * i + shift) % 17, start + (3 * i) % 19
        pairs.append((memory[to : to + length], source[origin : origin + length]))
        start += (length + 79) // 16 * 16
    return pairs


@pytest.mark.parametrize(
    ("lengths", "shift"),
    [*product(SHORT, range(17)), *product(LONG, (0, 1, 8, 16))],
    ids=lambda value: str(value) if isinstance(value, int) else f"{len(value)}-copies",
)
def test_any_length_at_any_offset(machine: Machine, lengths: list[int], shift: int) -> None:
    size = sum(lengths) + 128 * len(lengths)
    generator = torch.Generator().manual_seed(shift)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, generator=generator).to(machine.device)
    got, expected = (torch.full_like(source, POISON) for _ in range(2))
    machine.enqueue(CopyRowsKernel(machine.kernels, pairs_in(got, source, lengths, shift)))
    copy_rows(pairs_in(expected, source, lengths, shift))
    assert torch.equal(got, expected)


def test_tensors_of_several_dtypes_and_shapes(machine: Machine) -> None:
    tensors = [
        torch.randn(6, 5, 3, dtype=torch.bfloat16),
        torch.randn(6, 1, 7),
        torch.randint(0, 2, (6,)).bool(),
        torch.arange(6),
    ]
    rows = [tensor.to(machine.device) for tensor in tensors]
    machine.enqueue(CopyRowsKernel(machine.kernels, [(tensor[4:6], tensor[2:4]) for tensor in rows]))
    for tensor, before in zip(rows, tensors, strict=True):
        expected = torch.cat([before[:4], before[2:4]])
        assert torch.equal(tensor.cpu(), expected)


def test_tensors_must_be_alike(machine: Machine) -> None:
    one, other = torch.zeros(4, device=machine.device), torch.zeros(4, 1, device=machine.device)
    for pair in ((one, other), (one, one.double()), (one[::2], one[:2])):
        with pytest.raises(AssertionError):
            CopyRowsKernel(machine.kernels, [pair])
