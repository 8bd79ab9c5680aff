"""The pictures of a call, and what they add to a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageOptions:
    """How a picture becomes a condition, under diffusers' names; None is the default of the family.

    `image_embeddings` (1 or videos, 1, width) and `image_latents` (1 or videos, channels, height, width) come
    instead of the picture that they were made of.
    """

    image_embeddings: Tensor | None = None
    image_latents: Tensor | None = None
    motion_bucket_id: float | None = None
    noise_aug_strength: float | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """The names of those that are not left open."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)


@dataclass(frozen=True)
class Images:
    """Pictures as diffusers' image processors take them (PIL, array, tensor), by the names of arguments.

    Each is one for all videos, or has one per video; `each` are next to each other for every prompt.
    """

    image: Sequence[Any] = ()
    last_image: Sequence[Any] = ()
    options: ImageOptions = ImageOptions()
    each: int = 1

    @property
    def distinct(self) -> Sequence[Any]:
        """The pictures of `image`, of which each is there for `each` videos."""
        return self.image[:: self.each]


@dataclass(frozen=True)
class ImageCondition:
    """What pictures add to every row of a video.

    `channels` (videos, ...) are appended to those of the latents, in their layout. `context` (videos, tokens,
    width) are tokens beside the prompt's, `scalars` (videos, numbers) what else a model is told.
    """

    channels: Tensor
    context: Tensor | None = None
    scalars: Tensor | None = None


def posterior_samples(vae: Any, pixels: Tensor, videos: int, generator: Any) -> Tensor:
    """A sample (videos, ...) of the VAE's posterior of pixels (1 or videos, ...), drawn as diffusers does.

    `generator` is one for all videos, which draw one after the other, or a list with one each.
    """
    generators = generator if isinstance(generator, list) else [generator] * videos
    posteriors = [vae.encode(one).latent_dist for one in pixels.split(1)]
    posteriors *= videos if len(posteriors) == 1 else 1
    pairs = zip(posteriors, generators, strict=True)
    return torch.cat([posterior.sample(generator=own) for posterior, own in pairs])
