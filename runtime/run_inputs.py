"""The inputs of a run, from its noise to its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.image import CleanMode, ImageCondition
from stg_trt.models.text import TextCondition

from .noise import Generators


@dataclass(frozen=True, eq=False)
class RunInputs:
    """Packed noise (videos, ...) of every stream by its name in calls, times `solver.noise_scale`, and all
    that the steps depend on.

    A solver that adds noise draws it from `generator`.
    """

    latents: Mapping[str, Tensor]
    cond: TextCondition
    uncond: TextCondition | None
    guidance: Guidance
    solver: SolverTable
    frame_rate: float
    generator: Generators | None = None
    image: ImageCondition | None = None

    @property
    def clean(self) -> CleanMode | None:
        """How its steps treat latents that pictures give; None without any."""
        return None if self.image is None or self.image.clean is None else self.image.clean.mode
