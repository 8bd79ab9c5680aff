"""One whole step for one guidance state: row fan-out, the plan's engines, guidance and solver."""

from __future__ import annotations

from dataclasses import dataclass

from stg_trt.guidance import Guidance
from stg_trt.guided_step import StepState, fan_out_rows, guided_step
from stg_trt.kernels import GuidedStepKernel, load_kernels
from stg_trt.perturbation import Perturbation
from stg_trt.solver import SolverTable
from stg_trt.step_runner import StepRunner


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


class StepProgram:
    """Every run takes the step that the table's counter points at, and moves it on."""

    def __init__(self, key: StepKey, runner: StepRunner, state: StepState, stream: int) -> None:
        self.key = key
        self.plan = runner.plan
        self._runner = runner
        self._state = state
        self._stream = stream
        self._kernel = _kernel_for(key, state)

    def enqueue(self) -> None:
        """One step, in the order of the stream."""
        fan_out_rows(self._state, self.key.passes)
        self._runner.enqueue(self._stream)
        if self._kernel is not None:
            self._kernel.enqueue(self._stream)
            return
        guided_step(
            self._state,
            self.key.passes,
            rescaled=self.key.rescaled,
            two_term=self.key.two_term,
            cfg_zero_star=self.key.cfg_zero_star,
        )


def _kernel_for(key: StepKey, state: StepState) -> GuidedStepKernel | None:
    """The fused kernel on a GPU where it is built; it does not know CFG-Zero*."""
    if state.latents.device.type != "cuda" or key.cfg_zero_star:
        return None
    kernels = load_kernels()
    if kernels is None:
        return None
    return GuidedStepKernel(kernels, state, key.passes, rescaled=key.rescaled, two_term=key.two_term)
