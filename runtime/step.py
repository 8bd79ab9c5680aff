"""One whole step for one guidance state: row fan-out, the plan's engines, guidance and solver."""

from __future__ import annotations

from dataclasses import dataclass

from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.perturbation import Perturbation

from .bound_plan import BoundPlan, Operation
from .guided_step import fan_out_rows, guided_step
from .kernels.fan_out_rows import FanOutRowsKernel
from .kernels.guided_step import GuidedStepKernel
from .kernels.shared_library import Kernels, kernels_for
from .state import StepState


@dataclass(frozen=True)
class StepKey:
    """All that a program, and a graph captured from it, is specialised on; the rest is in the table."""

    passes: tuple[str, ...]
    perturbation: Perturbation | None
    rescaled: bool
    two_term: bool
    cfg_zero_star: bool

    @classmethod
    def of(cls, guidance: Guidance, solver: SolverTable, step: int) -> StepKey:
        """The key of one step."""
        return cls(
            guidance.passes(step),
            guidance.perturbation(step),
            guidance.rescale[step] != 0,
            solver.two_term[step] is not None,
            guidance.cfg_zero_star,
        )


class Step:
    """Every run takes the step that the table's counter points at, and moves it on."""

    def __init__(self, key: StepKey, runner: BoundPlan, state: StepState, stream: int) -> None:
        self.key = key
        self.plan = runner.plan
        self._stream = stream
        kernels = kernels_for(state.latents.device)
        self._operations = (
            _fan_out(key, state, kernels),
            runner.enqueue,
            _guided_step(key, state, kernels),
        )

    def enqueue(self) -> None:
        """One step, in the order of the stream."""
        for operation in self._operations:
            operation(self._stream)


def _fan_out(key: StepKey, state: StepState, kernels: Kernels | None) -> Operation:
    """The fused kernel where there is one."""
    if kernels is not None:
        return FanOutRowsKernel(kernels, state, key.passes).enqueue
    return lambda stream: fan_out_rows(state, key.passes)


def _guided_step(key: StepKey, state: StepState, kernels: Kernels | None) -> Operation:
    """The fused kernel where there is one; it does not know CFG-Zero*."""
    if kernels is not None and not key.cfg_zero_star:
        rescaled, two_term = key.rescaled, key.two_term
        return GuidedStepKernel(kernels, state, key.passes, rescaled=rescaled, two_term=two_term).enqueue
    return lambda stream: guided_step(
        state,
        key.passes,
        rescaled=key.rescaled,
        two_term=key.two_term,
        cfg_zero_star=key.cfg_zero_star,
    )
