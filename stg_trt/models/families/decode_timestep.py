"""VAEs of Lightricks that denoise as they decode: they take a timestep, and noise with the latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def add_decode_noise(latents: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Latents (videos, channels, frames, rows, columns) mixed with noise, and the timestep of each video.

    `decode_timestep` and `decode_noise_scale` are diffusers': one number, or one per video; `generator` is
    one or one per video.
    """
    from diffusers.utils.torch_utils import randn_tensor

    timestep = _per_video(options.get("decode_timestep", 0.0), latents)
    given = options.get("decode_noise_scale")
    scale = (timestep if given is None else _per_video(given, latents)).view(-1, 1, 1, 1, 1)
    # diffusers' own: it also takes a list of generators, and those of another device.
    noise = randn_tensor(
        latents.shape, generator=options.get("generator"), device=latents.device, dtype=latents.dtype
    )
    return (1 - scale) * latents + scale * noise, timestep


def _per_video(value: float | Sequence[float], latents: Tensor) -> Tensor:
    """One number for each video, of the latents' dtype and on their device."""
    values = [value] * len(latents) if isinstance(value, int | float | Real) else [*value]
    return torch.tensor([float(entry) for entry in values]).to(latents)
