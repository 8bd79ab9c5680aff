"""Standard normal noise, drawn as diffusers' pipelines draw it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class NoiseSource:
    """Where a stream's noise comes from: latents that are given, or a generator.

    `share` is the share of drawn noise in given latents of a model with sound.
    """

    generator: Generators | None
    given: Tensor | None = None
    share: float = 0.0


def starting_noise(family: ModelFamily, workload: Workload, videos: int, source: NoiseSource) -> Tensor:
    """Packed float32 noise of the videos: given, or drawn as diffusers draws it; raises InvalidRequest."""
    shape = (videos, *family.noise_shape(workload))
    packed = family.tensors(replace(workload, condition_frames=0))["latents"].with_rows(videos)
    if SOUND in family.streams:
        return _beside_sound("latents", shape, packed, family.pack, source)
    latents = draw(shape, source.generator) if source.given is None else source.given
    _check("latents", latents, (packed, shape))
    return (family.pack(latents) if tuple(latents.shape) == shape else latents).float()


def starting_sound(
    family: ModelFamily, workload: Workload, videos: int, source: NoiseSource
) -> Tensor | None:
    """The same of the videos' sound, drawn after the video's noise; None for a model without sound."""
    if SOUND not in family.streams:
        return None
    shape = (videos, *family.audio_noise_shape(workload))
    packed = family.tensors(workload)[SOUND.latents].with_rows(videos)
    return _beside_sound("audio_latents", shape, packed, family.pack_audio, source)


def _beside_sound(
    name: str,
    shape: tuple[int, ...],
    packed: tuple[int, ...],
    pack: Callable[[Tensor], Tensor],
    source: NoiseSource,
) -> Tensor:
    """Noise, or given latents with a share of it, which diffusers draws even if the share is 0.

    Only packed ones: those that are not, diffusers takes for latents of the VAE, and normalises them.
    """
    if source.given is None:
        return pack(draw(shape, source.generator)).float()
    _check(name, source.given, (packed,))
    return torch.lerp(source.given.float(), draw(packed, source.generator), source.share)


def _check(name: str, latents: Tensor, shapes: Sequence[Sequence[int]]) -> None:
    """Raises InvalidRequest unless the latents have one of the shapes and are finite."""
    if tuple(latents.shape) not in shapes:
        expected = " or ".join(str(tuple(shape)) for shape in shapes)
        raise InvalidRequest(
            f"{name}: expected {expected} for these engines, got {tuple(latents.shape)}: pass latents of the "
            "size that the engines were built for"
        )
    if not latents.isfinite().all():
        raise InvalidRequest(f"{name}: expected finite numbers, got NaN or infinity: check their source")
