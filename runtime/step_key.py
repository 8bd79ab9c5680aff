"""The facts that a step is specialised on."""

from __future__ import annotations

from dataclasses import dataclass

from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.image import CleanMode
from stg_trt.models.passes import COND, UNCOND, Pass, row_groups
from stg_trt.models.stream import RescaleSpace


@dataclass(frozen=True)
class StepKey:
    """All that a step, and a graph captured from it, is specialised on; the rest is in the step table."""

    passes: tuple[Pass, ...]
    rescaled: bool
    single_step: bool
    cfg_zero_star: bool
    clean: CleanMode | None = None
    expert: int = 0
    rescale_space: RescaleSpace = "prediction"

    @property
    def groups(self) -> range:
        """The row groups of its passes."""
        return row_groups(self.passes)

    @property
    def rescales_x0(self) -> bool:
        """Whether it rescales the clean latents that its prediction means."""
        return self.rescaled and self.rescale_space == "x0"

    @property
    def cond(self) -> int:
        """The index of cond among the passes."""
        return self.passes.index(COND)

    @property
    def zero_star(self) -> int | None:
        """The index of the pass that CFG-Zero* scales."""
        return self.passes.index(UNCOND) if self.cfg_zero_star else None

    @property
    def name(self) -> str:
        """For logs and profilers."""
        passes = "+".join(map(str, self.passes))
        return f"{passes} of expert {self.expert + 1}" if self.expert else passes

    @classmethod
    def of(
        cls, guidance: Guidance, solver: SolverTable, step: int, clean: CleanMode | None = None
    ) -> StepKey:
        """The key of one step, in a run with latents that are given or without."""
        passes = guidance.passes(step)
        return cls(
            passes,
            any(stream.rescale[step] != 0 for stream in (guidance, *guidance.others)),
            solver.single_step[step] is not None,
            guidance.cfg_zero_star and UNCOND in passes,
            clean,
            guidance.expert(step),
            guidance.rescale_space,
        )


def first_steps(
    guidance: Guidance, solver: SolverTable, clean: CleanMode | None = None
) -> dict[StepKey, int]:
    """Every key of a run with its first step."""
    firsts: dict[StepKey, int] = {}
    for step in range(len(guidance.cfg_scale)):
        firsts.setdefault(StepKey.of(guidance, solver, step, clean), step)
    return firsts
