"""The weighted sum of a step's predictions, and its rescale."""

from __future__ import annotations

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest


def combine(
    pred_cond: Tensor,
    pred_uncond: Tensor | None = None,
    pred_skip: Tensor | None = None,
    *,
    cfg_scale: float | Tensor = 1.0,
    stg_scale: float | Tensor = 0.0,
    rescale: float | Tensor = 0.0,
    cfg_zero_star: bool = False,
) -> Tensor:
    """uncond + cfg*(cond - uncond) + stg*(cond - skip), rescaled; float32, (batch, ...) as the inputs.

    A prediction whose scale is off (cfg 1, stg 0) is not read; a scale on the device counts as on. Float64
    stays float64. Raises InvalidRequest where a prediction that is read is None.
    """
    cond = pred = _widened(pred_cond)
    if _is_on(cfg_scale, off=1):
        uncond = _widened(_needed(pred_uncond, "pred_uncond", f"cfg_scale {cfg_scale}", "1"))
        if cfg_zero_star:
            uncond = _projected(cond, uncond)
        pred = uncond + cfg_scale * (cond - uncond)
    if _is_on(stg_scale, off=0):
        skip = _widened(_needed(pred_skip, "pred_skip", f"stg_scale {stg_scale}", "0"))
        pred = pred + stg_scale * (cond - skip)
    if _is_on(rescale, off=0):
        pred = pred * (rescale * _std(cond) / _std(pred) + (1 - rescale))
    return pred


def _is_on(scale: float | Tensor, off: float) -> bool:
    """Reads no tensor, since that would wait for the device."""
    return isinstance(scale, Tensor) or scale != off


def _needed(pred: Tensor | None, name: str, scale: str, off: str) -> Tensor:
    if pred is None:
        raise InvalidRequest(
            f"{name}: expected a tensor for {scale}, got None: compute that pass or set it to {off}"
        )
    return pred


def _widened(pred: Tensor) -> Tensor:
    return pred.to(torch.promote_types(pred.dtype, torch.float32))


def _std(pred: Tensor) -> Tensor:
    """Unbiased standard deviation per video, shaped to broadcast."""
    return pred.std(dim=tuple(range(1, pred.ndim)), keepdim=True)


def _projected(cond: Tensor, uncond: Tensor) -> Tensor:
    """CFG-Zero* (arXiv 2503.18886): uncond * <cond, uncond> / (|uncond|^2 + 1e-8), per video."""
    dims = tuple(range(1, cond.ndim))
    dot = (cond * uncond).sum(dims, keepdim=True)
    return uncond * (dot / (uncond.square().sum(dims, keepdim=True) + 1e-8))
