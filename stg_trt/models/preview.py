"""Small pictures of latents without a VAE: the colour of each position is linear in its latents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PreviewMap:
    """Colours in -1..1 are latents @ weight + bias, of weight (channels, 3).

    `fit` is the share of the colours' variance that it explained where it was fitted, R squared.
    """

    weight: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float]
    fit: float

    @classmethod
    def of(cls, latents: Tensor, colours: Tensor) -> PreviewMap:
        """The one that fits best, by least squares, of (positions, channels) and (positions, 3)."""
        x, y = latents.double(), colours.double()
        x_mean, y_mean = x.mean(0), y.mean(0)
        # Channels that others repeat get the smallest weights.
        weight = torch.linalg.pinv(x - x_mean, rtol=1e-6) @ (y - y_mean)
        rest = y - y_mean - (x - x_mean) @ weight
        fit = 1 - rest.square().sum() / (y - y_mean).square().sum().clamp_min(1e-12)
        return cls(_rounded(weight), _rounded((y_mean - x_mean @ weight)[None])[0], round(float(fit), 6))

    def frames(self, latents: Tensor) -> Frames:
        """(videos, channels, frames, rows, columns) as (videos, frames, rows, columns, 3)."""
        colours = latents.detach().cpu().float().movedim(1, -1) @ torch.tensor(self.weight)
        shown = ((colours + torch.tensor(self.bias)) / 2 + 0.5).nan_to_num(0.5).clamp(0, 1)
        frames: Frames = (shown * 255).round().to(torch.uint8).numpy()
        return frames


def _rounded(rows: Tensor) -> tuple[tuple[float, float, float], ...]:
    return tuple((round(r, 7), round(g, 7), round(b, 7)) for r, g, b in rows.tolist())
