"""Standard normal noise, drawn as diffusers' pipelines draw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest

if TYPE_CHECKING:
    from stg_trt.guidance.solver import SolverTable
    from stg_trt.models.families.base import ModelFamily
    from stg_trt.models.workload import Workload

Generators = torch.Generator | list[torch.Generator]


def listed(generator: Generators | tuple[torch.Generator, ...] | None) -> Generators | None:
    """A tuple of generators is a list of them."""
    return list(generator) if isinstance(generator, tuple) else generator


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


def starting_noise(
    family: ModelFamily, workload: Workload, videos: int, generator: Generators | None, given: Tensor | None
) -> Tensor:
    """Packed float32 noise of the videos: given, or drawn as diffusers draws it; raises InvalidRequest."""
    shape = (videos, *family.noise_shape(workload))
    packed = family.tensors(replace(workload, condition_frames=0))["latents"].with_rows(videos)
    latents = draw(shape, generator) if given is None else given
    if tuple(latents.shape) not in (packed, shape):
        raise InvalidRequest(
            f"latents: expected {packed} or {shape} for {workload}, got {tuple(latents.shape)}: "
            "pass latents of the size the engines were built for"
        )
    if not latents.isfinite().all():
        raise InvalidRequest("latents: expected finite numbers, got NaN or infinity: check their source")
    return (family.pack(latents) if tuple(latents.shape) == shape else latents).float()
