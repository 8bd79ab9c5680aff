"""The latents of a video of which only the first frame is given, or the first and the last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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


def latent_statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's latents, (channels, 1, 1, 1) each."""
    mean, std = vae.config.latents_mean, vae.config.latents_std
    shape = (-1, 1, 1, 1)
    return torch.tensor(mean, device=device).view(shape), torch.tensor(std, device=device).view(shape)
