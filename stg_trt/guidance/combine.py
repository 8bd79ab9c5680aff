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
    """uncond + cfg*(cond - uncond) + stg*(cond - skip), rescaled: (videos, ...) in float32 or above.

    A scale is a number, or a tensor (1,) on the device, which the host never reads. A pass that its scale
    turns off (cfg 1, stg 0) is not read. Raises InvalidRequest if a pass that is on is None.
    """
    pred = cond = _float32(pred_cond)
    if _is_on(cfg_scale, off=1):
        uncond = _needed(pred_uncond, "uncond", "cfg_scale", cfg_scale, off=1)
        if cfg_zero_star:
            uncond = _project(cond, uncond)
        pred = uncond + cfg_scale * (cond - uncond)
    if _is_on(stg_scale, off=0):
        skip = _needed(pred_skip, "skip", "stg_scale", stg_scale, off=0)
        pred = pred + stg_scale * (cond - skip)
    if _is_on(rescale, off=0):
        pred = pred * (rescale * _std(cond) / _std(pred) + (1 - rescale))
    return pred


def _is_on(scale: float | Tensor, off: int) -> bool:
    return isinstance(scale, Tensor) or scale != off


def _needed(pred: Tensor | None, row: str, name: str, scale: float | Tensor, off: int) -> Tensor:
    if pred is None:
        raise InvalidRequest(
            f"pred_{row}: expected a tensor for {name} {scale}, got None: compute that pass or set it to "
            f"{off}"
        )
    return _float32(pred)


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
