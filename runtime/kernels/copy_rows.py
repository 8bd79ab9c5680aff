"""Several copies between tensors in one launch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from .shared_library import Kernels, address


class RowCopy(ctypes.Structure):
    """`StgRowCopy` of plugins/copy_rows/copy_rows.h, field for field."""

    _fields_ = (("destination", ctypes.c_void_p), ("source", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class CopyRowsParameters(ctypes.Structure):
    """`StgCopyRows` of plugins/copy_rows/copy_rows.h, field for field."""

    _fields_ = (("copies", ctypes.POINTER(RowCopy)), ("count", ctypes.c_int64))


class CopyRowsKernel:
    """Copies of (destination, source) pairs; both are contiguous and alike, and no destination overlaps."""

    def __init__(self, kernels: Kernels, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._kernels = kernels
        self._pairs = tuple(pairs)
        copies = []
        for destination, source in pairs:
            assert destination.shape == source.shape and destination.dtype == source.dtype
            copies.append(RowCopy(address(destination), address(source), source.numel() * source.itemsize))
        self._parameters = CopyRowsParameters((RowCopy * len(copies))(*copies), len(copies))

    def enqueue(self, stream: int) -> None:
        """All of the copies."""
        self._kernels.enqueue("stg_copy_rows", self._parameters, stream)


def copy_rows(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """The kernel's reference, in torch."""
    for destination, source in pairs:
        destination.copy_(source)
