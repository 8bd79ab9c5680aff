"""Standard normal noise, drawn as diffusers' pipelines draw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.stream import SOUND

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
    _check("latents", latents, (packed, shape), workload)
    return (family.pack(latents) if tuple(latents.shape) == shape else latents).float()


def starting_sound(
    family: ModelFamily, workload: Workload, videos: int, generator: Generators | None, given: Tensor | None
) -> Tensor | None:
    """The same of the videos' sound, drawn after the video's noise; None for a model without sound."""
    if SOUND not in family.streams:
        if given is not None:
            raise InvalidRequest(
                f"audio_latents: expected none for {family.name}, which makes no sound, got "
                f"{tuple(given.shape)}: leave them out"
            )
        return None
    shape = (videos, *family.audio_noise_shape(workload))
    packed = family.tensors(workload)[SOUND.latents].with_rows(videos)
    latents = draw(shape, generator) if given is None else given
    _check("audio_latents", latents, (packed, shape), workload)
    return (family.pack_audio(latents) if tuple(latents.shape) == shape else latents).float()


def _check(name: str, latents: Tensor, shapes: Sequence[Sequence[int]], workload: Workload) -> None:
    """Raises InvalidRequest unless the latents have one of two shapes and are finite."""
    if tuple(latents.shape) not in shapes:
        raise InvalidRequest(
            f"{name}: expected {shapes[0]} or {shapes[1]} for {workload}, got {tuple(latents.shape)}: "
            "pass latents of the size the engines were built for"
        )
    if not latents.isfinite().all():
        raise InvalidRequest(f"{name}: expected finite numbers, got NaN or infinity: check their source")
