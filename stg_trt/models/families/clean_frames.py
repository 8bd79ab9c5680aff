"""Pictures as clean frames of a video whose latents are a sequence of tokens.

Their latents stand where noise would, and the network is told that these tokens are clean. Pictures for
later frames are tokens of their own before the video's, with the positions of the frames that they are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.image import (
    CleanLatents,
    FrameCondition,
    ImageCondition,
    Images,
    Start,
    posterior_means,
    posterior_samples,
)
from stg_trt.models.workload import Workload

# Of a video for later frames, so many latent frames become tokens of their own.
PREFIX_FRAMES = 2


@dataclass(frozen=True)
class Encoder:
    """The VAE of a diffusers pipeline for one call; what it draws, all videos share or each draws its own.

    `pipeline_class` is the diffusers class that knows how latents are normalised and packed. Without `draws`
    they are the means of the VAE's posteriors.
    """

    pipeline: Any
    pipeline_class: Any
    workload: Workload
    videos: int
    generator: Any
    draws: bool = True

    def pixels(self, pictures: Sequence[Any]) -> Tensor:
        """Pictures (pictures, 3, height, width) of the video's size, as the pipeline prepares them."""
        size = (self.workload.height, self.workload.width)
        pixels: Tensor = self.pipeline.video_processor.preprocess([*pictures], *size)
        return pixels

    def latents(self, pixels: Tensor) -> Tensor:
        """Normalised latents (1 or videos, channels, frames, height, width) of pixels in the same layout.

        As diffusers draws them: a single generator draws one for each picture, and a list one per video.
        """
        vae = self.pipeline.vae
        pixels = pixels.to(vae.device, vae.dtype)
        samples = self.videos if isinstance(self.generator, list) else len(pixels)
        found = (
            posterior_samples(vae, pixels, samples, self.generator)
            if self.draws
            else posterior_means(vae, pixels)
        )
        normalized: Tensor = self.pipeline_class._normalize_latents(
            found.float(), vae.latents_mean, vae.latents_std
        )
        return normalized.cpu()

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Noise of one shape (1, ...), drawn as the samples are."""
        from diffusers.utils.torch_utils import randn_tensor

        several = isinstance(self.generator, list)
        noise: Tensor = randn_tensor(
            (self.videos if several else 1, *shape[1:]), generator=self.generator, dtype=torch.float32
        )
        return noise

    def frames(self, condition: FrameCondition, temporal: int) -> Tensor:
        """Pixels (1, 3, frames, height, width) of a condition, as many as the VAE and the video take."""
        first, workload = condition.frame_index, self.workload
        if first >= workload.num_frames:
            raise InvalidRequest(
                f"frame_index: expected 0 to {workload.num_frames - 1}, the frames it has, got {first}: "
                "choose one of them"
            )
        pictures = self.pixels(condition.pictures)
        fitting = min(len(pictures), workload.num_frames - first)
        kept: Tensor = pictures[: (fitting - 1) // temporal * temporal + 1]
        return kept.transpose(0, 1)[None].contiguous()


@dataclass(frozen=True)
class _Extra:
    """Latents (1 or videos, channels, frames, height, width) before the video's, with noise like them."""

    frame_index: int
    latents: Tensor
    noise: Tensor
    strength: float


@dataclass
class _Canvas:
    """The latents of the video as conditions are painted on them, and the tokens that stand before it."""

    noise_share: Tensor
    added: Tensor
    strength: Tensor
    extra: list[_Extra] = field(default_factory=list)

    @classmethod
    def empty(cls, videos: int, shape: Sequence[int]) -> _Canvas:
        """Nothing but noise, for latents of a shape (channels, frames, height, width)."""
        one = (1, 1, shape[1], 1, 1)
        return cls(torch.ones(one), torch.zeros(videos, *shape), torch.zeros(one))

    def paint(self, latents: Tensor, first: int, strength: float) -> None:
        """Mixes latents into the video's, from a latent frame on."""
        frames = slice(first, first + latents.shape[2])
        self.noise_share[:, :, frames] *= 1 - strength
        self.added[:, :, frames] = torch.lerp(self.added[:, :, frames], latents, strength)
        self.strength[:, :, frames] = strength


def first_frame(encoder: Encoder, pixels: Tensor, shape: Sequence[int]) -> ImageCondition:
    """Pixels (1 or videos, 3, height, width) as the first of latents (channels, frames, height, width)."""
    canvas = _Canvas.empty(encoder.videos, shape)
    canvas.paint(encoder.latents(pixels[:, :, None]), 0, 1.0)
    return _condition(encoder, canvas, shape, 0.0)


def frame_conditions(encoder: Encoder, images: Images, shape: Sequence[int], temporal: int) -> ImageCondition:
    """Latents (channels, frames, height, width) under all conditions, one after the other.

    `temporal` is how many frames a latent holds.
    """
    canvas = _Canvas.empty(encoder.videos, shape)
    for condition in images.conditions:
        latents = encoder.latents(encoder.frames(condition, temporal))
        if condition.frame_index == 0:
            canvas.paint(latents, 0, condition.strength)
            continue
        prefix, rest = latents[:, :, :PREFIX_FRAMES], latents[:, :, PREFIX_FRAMES:]
        if rest.shape[2]:
            canvas.paint(rest, condition.frame_index // temporal + PREFIX_FRAMES, condition.strength)
        noise = encoder.noise(prefix.shape)
        canvas.extra.append(_Extra(condition.frame_index, prefix, noise, condition.strength))
    return _condition(encoder, canvas, shape, images.noise_scale)


def _condition(encoder: Encoder, canvas: _Canvas, shape: Sequence[int], noise_scale: float) -> ImageCondition:
    """What is on the canvas, packed."""
    pack = encoder.pipeline_class._pack_latents
    videos = len(canvas.added)
    share, strength = (
        [pack(mask.expand(1, 1, *shape[1:]))] for mask in (canvas.noise_share, canvas.strength)
    )
    added: list[Tensor] = [pack(canvas.added)]
    noise: list[Tensor] = []
    for extra in reversed(canvas.extra):
        packed = pack(extra.latents).expand(videos, -1, -1)
        added.insert(0, packed * extra.strength)
        noise.insert(0, pack(extra.noise).expand(videos, -1, -1))
        share.insert(0, torch.full((1, packed.shape[1], 1), 1 - extra.strength))
        strength.insert(0, torch.full((1, packed.shape[1], 1), extra.strength))
    start = Start(torch.cat(share, 1), torch.cat(added, 1), torch.cat(noise, 1) if noise else None)
    clean = CleanLatents(torch.cat(strength, 1)[0], noise_scale)
    places = tuple((extra.frame_index, extra.latents.shape[2]) for extra in canvas.extra)
    return ImageCondition(start=start, clean=clean, placed=places)


def extra_frames(condition: FrameCondition, num_frames: int, temporal: int) -> int:
    """The latent frames of a condition that become tokens of their own."""
    if condition.frame_index == 0:
        return 0
    fitting = min(len(condition.pictures), num_frames - condition.frame_index)
    return min(PREFIX_FRAMES, (fitting - 1) // temporal + 1)
