"""The most likely latents of pictures: of a video around them, or in the place of the first frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stg_trt.models.image import CleanLatents, ImageCondition, Images, Start
from stg_trt.models.workload import Workload


def given_frames(pipeline: Any, sets: Sequence[Any], workload: Workload, temporal: int) -> Tensor:
    """Mask and latents (1 or videos, channels, frames, height, width) of first pictures, and of last ones.

    The VAE makes one frame of latents of `temporal` frames, and of the first alone.
    """
    pixels = [pipeline.video_processor.preprocess([*s], workload.height, workload.width) for s in sets]
    of_videos = zip(*pixels, strict=True)
    return torch.cat([_around(pipeline.vae, pictures, workload, temporal) for pictures in of_videos])


def first_frame(
    pipeline: Any, images: Images, shape: Sequence[int], workload: Workload, videos: int
) -> ImageCondition:
    """Latents (channels, frames, height, width) that the network reads with the picture as first frame."""
    size = (workload.height, workload.width)
    pixels = pipeline.video_processor.preprocess([*images.image], *size)[:, :, None]
    latents = torch.cat([_latents(pipeline.vae, one) for one in pixels.split(1)])
    strength = first_frame_strength(shape)
    return ImageCondition(clean=CleanLatents(strength, replaced_by=latents.expand(videos, *shape)))


def first_frame_strength(shape: Sequence[int]) -> Tensor:
    """1 in the first frame of latents (channels, frames, height, width), (1, frames, 1, 1)."""
    strength = torch.zeros(1, shape[1], 1, 1)
    strength[:, 0] = 1
    return strength


def _around(vae: Any, pictures: Sequence[Tensor], workload: Workload, temporal: int) -> Tensor:
    """Mask and latents (1, channels, frames, height, width) of one video's pictures (3, height, width)."""
    video = torch.zeros(1, 3, workload.num_frames, workload.height, workload.width)
    given = torch.zeros(workload.num_frames + temporal - 1)
    # The first frame stands alone in its latents, so it counts as many times as they hold frames.
    given[:temporal] = 1
    for frame, picture in zip((0, -1), pictures, strict=False):
        video[0, :, frame] = picture
        given[frame] = 1
    latents = _latents(vae, video)
    mask = given.to(latents).unflatten(0, (-1, temporal)).T[None, :, :, None, None]
    return torch.cat([mask.expand(-1, -1, -1, *latents.shape[3:]), latents], 1)


def mixed_first_frame(first: Tensor, shape: Sequence[int], videos: int, *, replaces: bool) -> ImageCondition:
    """Scaled latents (1 or videos, channels, 1, height, width) of a picture, for videos of a latent shape.

    All frames start from a thousandth of it. With `replaces` the first frame is the picture's and every step
    keeps it; else the model has it, and a mask, in channels beside the latents.
    """
    mask = first_frame_strength(shape)[None]
    share = torch.tensor(0.999)
    whole = first.expand(videos, *shape)
    if replaces:
        weight = mask + (1 - mask) * (1 - share)
        return ImageCondition(start=Start((1 - mask) * share, whole * weight), clean=CleanLatents(mask[0]))
    channels = torch.cat([whole * mask, mask.expand(videos, 1, *shape[1:])], 1)
    return ImageCondition(channels, start=Start(share, whole * (1 - share)))


def _latents(vae: Any, video: Tensor) -> Tensor:
    """Normalised, of pixels (1, 3, frames, height, width)."""
    latents: Tensor = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = latent_statistics(vae, latents.device)
    return (latents - mean) * (1 / std)


def latent_statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's latents, (channels, 1, 1, 1) each."""
    mean, std = vae.config.latents_mean, vae.config.latents_std
    shape = (-1, 1, 1, 1)
    return torch.tensor(mean, device=device).view(shape), torch.tensor(std, device=device).view(shape)
