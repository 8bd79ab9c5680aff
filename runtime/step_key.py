"""The facts that a step is specialised on."""

from __future__ import annotations

from dataclasses import dataclass

from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.passes import Pass
from stg_trt.models.perturbation import Perturbation


@dataclass(frozen=True)
class StepKey:
    """All that a step, and a graph captured from it, is specialised on; the rest is in the step table."""

    passes: tuple[Pass, ...]
    perturbation: Perturbation | None
    rescaled: bool
    single_step: bool
    cfg_zero_star: bool

    @classmethod
    def of(cls, guidance: Guidance, solver: SolverTable, step: int) -> StepKey:
        """The key of one step."""
        passes = guidance.passes(step)
        return cls(
            passes,
            guidance.perturbation(step),
            guidance.rescale[step] != 0,
            solver.single_step[step] is not None,
            guidance.cfg_zero_star and "uncond" in passes,
        )


def first_steps(guidance: Guidance, solver: SolverTable) -> dict[StepKey, int]:
    """Every key of a run with its first step."""
    firsts: dict[StepKey, int] = {}
    for step in range(len(guidance.cfg_scale)):
        firsts.setdefault(StepKey.of(guidance, solver, step), step)
    return firsts
