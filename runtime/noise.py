"""Standard normal noise, drawn as diffusers' pipelines draw it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stg_trt.guidance.solver import SolverTable

Generators = torch.Generator | list[torch.Generator]


def draw(shape: Sequence[int], generator: Generators | None) -> Tensor:
    """One draw (videos, ...) in float32 on the CPU; a list of generators has one per video."""
    from diffusers.utils.torch_utils import randn_tensor

    noise: Tensor = randn_tensor(tuple(shape), generator=generator, dtype=torch.float32)
    return noise


def draw_for(solver: SolverTable, steps: int, shape: Sequence[int], generator: Generators | None) -> Tensor:
    """The noise of a solver's first steps, (draws used, *shape), drawn in the scheduler's order."""
    used = solver.used_draws(steps)
    noise = torch.empty(len(used), *shape)
    for k in range(sum(solver.draws[:steps])):
        drawn = draw(shape, generator)
        if k in used:
            noise[used.index(k)] = drawn
    return noise
