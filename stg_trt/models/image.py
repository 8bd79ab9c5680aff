"""The pictures of a call, and what they add to a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest

Places = tuple[tuple[int, int], ...]
CleanMode = Literal["held", "noised", "replaced"]


@dataclass(frozen=True)
class FrameCondition:
    """Pictures that a video shows from its frame `frame_index` on, one or those of a video.

    They are whatever diffusers' video processor takes. At `strength` 1 they are kept as they are, at 0 they
    change nothing.
    """

    pictures: Sequence[Any]
    frame_index: int = 0
    strength: float = 1.0

    def __post_init__(self) -> None:
        if type(self.frame_index) is not int or self.frame_index < 0:
            raise InvalidRequest(
                f"frame_index: expected a frame number from 0 on, got {self.frame_index!r}: count from 0"
            )
        if not isinstance(self.strength, Real) or not 0 <= self.strength <= 1:
            raise InvalidRequest(
                f"strength: expected a number from 0 to 1, got {self.strength!r}: use 1 to keep the picture"
            )


@dataclass(frozen=True)
class ImageOptions:
    """How a picture becomes a condition, under diffusers' names; None is the default of the family.

    `image_embeddings` (1 or videos, 1, width) and `image_latents` (1 or videos, channels, height, width) come
    instead of the picture that they were made of. `video`, `frame_index` and `strength` are the short form of
    conditions, one for each or one for all.
    """

    image_embeddings: Tensor | None = None
    image_latents: Tensor | None = None
    image_cond_noise_scale: float | None = None
    video: Any = None
    frame_index: int | Sequence[int] | None = None
    strength: float | Sequence[float] | None = None
    motion_bucket_id: float | None = None
    noise_aug_strength: float | None = None
    image_crf: int | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """The names of those that are not left open."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)


@dataclass(frozen=True)
class Images:
    """Pictures as diffusers' image processors take them (PIL, array, tensor), by the names of arguments.

    Each of `image` and `last_image` is one for all videos, or has one per video, of which `each` are next to
    each other for every prompt; `conditions` are for all. Every step adds `noise_scale` of noise to what they
    give at strength 1, times its noise level squared.
    """

    image: Sequence[Any] = ()
    last_image: Sequence[Any] = ()
    conditions: Sequence[FrameCondition] = ()
    noise_scale: float = 0.0
    options: ImageOptions = ImageOptions()
    each: int = 1

    @property
    def distinct(self) -> Sequence[Any]:
        """The pictures of `image`, of which each is there for `each` videos."""
        return self.image[:: self.each]


@dataclass(frozen=True)
class Start:
    """What a run starts from: noise_share * noise + added, in the layout of its latents (videos, ...).

    `extra_noise` (videos, tokens, channels) is that of tokens before the video's own.
    """

    noise_share: Tensor
    added: Tensor
    extra_noise: Tensor | None = None

    def of(self, noise: Tensor) -> Tensor:
        """The start, of the noise of the video."""
        if self.extra_noise is not None:
            noise = torch.cat([self.extra_noise, noise], 1)
        return noise * self.noise_share + self.added


@dataclass(frozen=True)
class CleanLatents:
    """Latents that are given, which the network is told to be less noisy than the others.

    Those of a `strength` above 0, which is 1 where they are clean, and broadcasts to one video's latents. A
    step leaves them as they are while its noise level is above 1 - strength. With `noise_scale`, it first
    adds that much noise to the clean ones, times its noise level squared. With `replaced_by` (videos, ...),
    it moves them as all others, and the network reads these instead.
    """

    strength: Tensor
    noise_scale: float = 0.0
    replaced_by: Tensor | None = None

    @property
    def mode(self) -> CleanMode:
        """How a step treats them."""
        if self.replaced_by is not None:
            return "replaced"
        return "noised" if self.noise_scale > 0 else "held"


@dataclass(frozen=True)
class ImageCondition:
    """What pictures add to every row of a video.

    `channels` (videos, ...) are appended to those of the latents, in their layout. `context` (videos, tokens,
    width) are tokens beside the prompt's, `scalars` (videos, numbers) what else a model is told. `placed` are
    the frame and the latent frames of each picture that is tokens before the video's.
    """

    channels: Tensor | None = None
    context: Tensor | None = None
    scalars: Tensor | None = None
    start: Start | None = None
    clean: CleanLatents | None = None
    placed: Places = ()


def posterior_samples(vae: Any, pixels: Tensor, videos: int, generator: Any) -> Tensor:
    """A sample (videos, ...) of the VAE's posterior of pixels (1 or videos, ...), drawn as diffusers does.

    `generator` is one for all videos, which draw one after the other, or a list with one each.
    """
    generators = generator if isinstance(generator, list) else [generator] * videos
    posteriors = [vae.encode(one).latent_dist for one in pixels.split(1)]
    posteriors *= videos if len(posteriors) == 1 else 1
    pairs = zip(posteriors, generators, strict=True)
    return torch.cat([posterior.sample(generator=own) for posterior, own in pairs])


def posterior_means(vae: Any, pixels: Tensor) -> Tensor:
    """The mean (pictures, ...) of the VAE's posterior of each picture."""
    return torch.cat([vae.encode(one).latent_dist.mode() for one in pixels.split(1)])
