"""The work around the engines, as operations that are prepared once and enqueued in every step."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from .guided_step import fan_out_rows, guided_step
from .kernels.copy_rows import copy_rows
from .state import StepState
from .step_key import StepKey

Operation = Callable[[int], None]
"""Enqueues work on a CUDA stream; 0 on the CPU."""


class Operations(Protocol):
    """How a device does the work around the engines; chosen once, where the device is opened."""

    def copy_rows(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Operation:
        """Copies of (destination, source), alike and contiguous; no destination overlaps another tensor."""

    def fan_out_rows(self, state: StepState, groups: range) -> Operation:
        """The latents, scaled and cast, to the rows of each group, with the step's timestep."""

    def guided_step(self, state: StepState, key: StepKey) -> Operation:
        """Guidance, rescale and the solver's step; it advances the counter."""


class TorchOperations:
    """Torch's own operations, enqueued on its current stream, which is the one that they are given."""

    def copy_rows(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Operation:
        """One copy after the other."""
        return lambda stream: copy_rows(pairs)

    def fan_out_rows(self, state: StepState, groups: range) -> Operation:
        """An operation per row group and table."""
        return lambda stream: fan_out_rows(state, groups)

    def guided_step(self, state: StepState, key: StepKey) -> Operation:
        """An operation per term of the equations."""
        return lambda stream: guided_step(state, key)


class CpuOperations(TorchOperations):
    """On the CPU, where torch's threads go on spinning after a large copy, which holds up the engines."""

    def copy_rows(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Operation:
        """One copy after the other, each by the calling thread alone."""

        def enqueue(stream: int) -> None:
            for destination, source in pairs:
                ctypes.memmove(destination.data_ptr(), source.data_ptr(), source.nbytes)

        return enqueue
