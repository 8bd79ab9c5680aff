"""The work around the engines in the library's kernels: one launch each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..operations import Operation
from ..state import StepState
from ..step_key import StepKey
from .copy_rows import CopyRowsKernel
from .fan_out_rows import FanOutRowsKernel
from .guided_step import GuidedStepKernel
from .shared_library import Kernels


class KernelOperations:
    """`stg_trt.runtime.operations.Operations` by the kernels of a loaded library."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def copy_rows(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Operation:
        """All copies at once."""
        return CopyRowsKernel(self.kernels, pairs).enqueue

    def fan_out_rows(self, state: StepState, groups: range) -> Operation:
        """All rows and timesteps at once."""
        return FanOutRowsKernel(self.kernels, state, groups).enqueue

    def guided_step(self, state: StepState, key: StepKey) -> Operation:
        """One pass over the latents, before it one each for CFG-Zero*'s products and rescale's moments."""
        return GuidedStepKernel(self.kernels, state, key).enqueue
