"""The sines and cosines of a timestep, with the frequencies that torch computes.

A compiler that computes the exponentials itself rounds their last bit otherwise, and a timestep of 1000 makes
6e-5 of angle of that, or 4e-4 of a guidance of 6000: more than all that follows in the network adds.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

_LONGEST_PERIOD = 10000


class TimestepSines(nn.Module):
    """Bit for bit what diffusers' Timesteps computes, of whose settings it is made."""

    frequencies: Tensor

    def __init__(self, timesteps: Any) -> None:
        super().__init__()
        self.scale, self.flips = timesteps.scale, timesteps.flip_sin_to_cos
        self.padding = timesteps.num_channels % 2
        half = timesteps.num_channels // 2
        exponents = -math.log(_LONGEST_PERIOD) * torch.arange(half, dtype=torch.float32)
        frequencies = (exponents / (half - timesteps.downscale_freq_shift)).exp()
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, timesteps: Tensor) -> Tensor:
        """(rows,) to (rows, channels)."""
        angles = self.scale * (timesteps[:, None].float() * self.frequencies)
        sines = [angles.sin(), angles.cos()]
        return pad(torch.cat(sines[::-1] if self.flips else sines, -1), (0, self.padding))


def fix_frequencies(network: nn.Module) -> None:
    """Replaces every Timesteps of diffusers in a network, in place."""
    from diffusers.models.embeddings import Timesteps

    for module in [*network.modules()]:
        for name, child in module.named_children():
            if isinstance(child, Timesteps):
                setattr(module, name, TimestepSines(child))
