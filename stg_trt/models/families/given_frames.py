"""The latents of a video of which only the first frame is given, or the first and the last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stg_trt.models.image import CleanLatents, ImageCondition, Start
from stg_trt.models.workload import Workload


def given_frames(vae: Any, pictures: Sequence[Tensor], workload: Workload, temporal: int) -> Tensor:
    """Mask and most likely latents (1, channels, frames, height, width) of pictures (3, height, width).

    The VAE makes one frame of latents of `temporal` frames, and of the first alone.
    """
    video = torch.zeros(1, 3, workload.num_frames, workload.height, workload.width)
    given = torch.zeros(workload.num_frames + temporal - 1)
    # The first frame stands alone in its latents, so it counts as many times as they hold frames.
    given[:temporal] = 1
    for frame, picture in zip((0, -1), pictures, strict=False):
        video[0, :, frame] = picture
        given[frame] = 1
    latents = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = latent_statistics(vae, latents.device)
    mask = given.to(latents).unflatten(0, (-1, temporal)).T[None, :, :, None, None]
    latents = (latents - mean) * (1 / std)
    return torch.cat([mask.expand(-1, -1, -1, *latents.shape[3:]), latents], 1)


def first_frame(first: Tensor, frames: int, videos: int, *, replaces: bool) -> ImageCondition:
    """Scaled latents (1 or videos, channels, 1, height, width) of a picture, for videos of so many frames.

    All frames start from a thousandth of it. With `replaces` the first frame is the picture's and every step
    keeps it; else the model has it, and a mask, in channels beside the latents.
    """
    mask = (torch.arange(frames) == 0).float()[None, None, :, None, None]
    share = torch.tensor(0.999)
    whole = first.expand(videos, -1, frames, -1, -1)
    if replaces:
        weight = mask + (1 - mask) * (1 - share)
        return ImageCondition(start=Start((1 - mask) * share, whole * weight), clean=CleanLatents(mask[0]))
    channels = torch.cat([whole * mask, mask.expand(videos, 1, frames, *first.shape[3:])], 1)
    return ImageCondition(channels, start=Start(share, whole * (1 - share)))


def latent_statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's latents, (channels, 1, 1, 1) each."""
    mean, std = vae.config.latents_mean, vae.config.latents_std
    shape = (-1, 1, 1, 1)
    return torch.tensor(mean, device=device).view(shape), torch.tensor(std, device=device).view(shape)
