"""The weighted sum of a step's predictions, and its rescale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoisyLatents:
    """Latents (videos, ...) that are clean latents x0 and noise, x = (1 - sigma)*x0 + sigma*noise.

    `sigma` is a number, or a tensor (1,) on the device. A model that predicts the velocity noise - x0 means
    x0 = x - sigma*v.
    """

    latents: Tensor
    sigma: float | Tensor


def combine(
    preds: Tensor,
    weights: Tensor,
    cond: int,
    *,
    rescale: float | Tensor = 0.0,
    zero_star: int | None = None,
    noisy: NoisyLatents | None = None,
) -> Tensor:
    """sum_k weights_k * preds_k, rescaled: (passes, videos, ...) to (videos, ...) in float32 or above.

    `weights` (passes,) or (passes, frames) add up to 1; those for frames belong to the first dimension of a
    video. It is computed as cond + sum_k weights_k * (pred_k - cond), which is exact where predictions are
    equal, so the weight of `cond`, an index, is not read. `rescale` is a number, or a tensor (1,) on the
    device, which the host never reads. `zero_star` is the index of uncond for CFG-Zero*. With `noisy`
    latents, what is rescaled are the clean latents that the predictions mean, as velocities.
    """
    preds = _float32(preds)
    of_cond = pred = preds[cond]
    for k, other in enumerate(preds):
        if k == cond:
            continue
        if k == zero_star:
            other = _project(of_cond, other)
        pred = pred + _per_frame(weights[k], pred) * (other - of_cond)
    if isinstance(rescale, Tensor) or rescale != 0:
        if noisy is not None:
            return _rescaled_x0(of_cond, pred, rescale, noisy)
        pred = pred * (rescale * _std(of_cond) / _std(pred) + (1 - rescale))
    return pred


def _rescaled_x0(of_cond: Tensor, pred: Tensor, rescale: float | Tensor, noisy: NoisyLatents) -> Tensor:
    """x0 = x - sigma*v times a factor f, as a velocity again: f*v + (1 - f)*x/sigma."""
    x, sigma = noisy.latents, noisy.sigma
    change = rescale * (_std(x - sigma * of_cond) / _std(x - sigma * pred) - 1)
    return pred + change * (pred - x / sigma)


def _per_frame(weight: Tensor, pred: Tensor) -> Tensor:
    """A pass's weight, or its weights of all frames, shaped to broadcast to (videos, frames, ...)."""
    return weight.reshape(-1, *[1] * (pred.ndim - 2)) if weight.numel() > 1 else weight


def _float32(pred: Tensor) -> Tensor:
    """Lower precisions as float32; float64 stays."""
    return pred.to(torch.promote_types(pred.dtype, torch.float32))


def _std(pred: Tensor) -> Tensor:
    """Unbiased standard deviation per video, shaped to broadcast."""
    return pred.std(dim=tuple(range(1, pred.ndim)), keepdim=True)


def _project(cond: Tensor, uncond: Tensor) -> Tensor:
    """CFG-Zero* (arXiv 2503.18886): uncond * <cond, uncond> / (|uncond|^2 + 1e-8), per video."""
    dims = tuple(range(1, cond.ndim))
    dot = (cond * uncond).sum(dims, keepdim=True)
    return uncond * (dot / (uncond.square().sum(dims, keepdim=True) + 1e-8))
