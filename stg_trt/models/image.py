"""The pictures of a call, and what they add to a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Pictures as diffusers' image processors take them (PIL, array, tensor), by the names of arguments.

    Each is one for all videos, or has one per video.
    """

    image: Sequence[Any] = ()
    last_image: Sequence[Any] = ()


@dataclass(frozen=True)
class ImageCondition:
    """What pictures add to every row of a video.

    `channels` (videos, ...) are appended to those of the latents, in their layout. `context` (videos, tokens,
    width) are tokens beside the prompt's.
    """

    channels: Tensor
    context: Tensor | None = None


def posterior_samples(vae: Any, pixels: Tensor, videos: int, generator: Any) -> Tensor:
    """A sample (videos, ...) of the VAE's posterior of pixels (1 or videos, ...), drawn as diffusers does.

    `generator` is one for all videos, which draw one after the other, or a list with one each.
    """
    generators = generator if isinstance(generator, list) else [generator] * videos
    posteriors = [vae.encode(one).latent_dist for one in pixels.split(1)]
    posteriors *= videos if len(posteriors) == 1 else 1
    pairs = zip(posteriors, generators, strict=True)
    return torch.cat([posterior.sample(generator=own) for posterior, own in pairs])
