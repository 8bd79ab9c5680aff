"""The weighted sum of a step's predictions, and its rescale."""

from __future__ import annotations

from torch import Tensor

from stg_trt.errors import InvalidRequest


def combine(
    pred_cond: Tensor,
    pred_uncond: Tensor | None = None,
    pred_skip: Tensor | None = None,
    *,
    cfg_scale: float = 1.0,
    stg_scale: float = 0.0,
    rescale: float = 0.0,
    cfg_zero_star: bool = False,
) -> Tensor:
    """uncond + cfg*(cond - uncond) + stg*(cond - skip), rescaled; float32, (batch, ...) as the inputs.

    A prediction whose scale is off (cfg 1, stg 0) is not read. Raises InvalidRequest where one is missing.
    """
    uncond = skip = None
    if cfg_scale != 1:
        uncond = _needed(pred_uncond, "pred_uncond", f"cfg_scale {cfg_scale}", "1").float()
    if stg_scale != 0:
        skip = _needed(pred_skip, "pred_skip", f"stg_scale {stg_scale}", "0").float()
    return combined(
        pred_cond.float(),
        uncond,
        skip,
        cfg_scale=cfg_scale,
        stg_scale=stg_scale,
        rescale=rescale if rescale != 0 else None,
        cfg_zero_star=cfg_zero_star,
    )


def combined(
    cond: Tensor,
    uncond: Tensor | None,
    skip: Tensor | None,
    *,
    cfg_scale: float | Tensor,
    stg_scale: float | Tensor,
    rescale: float | Tensor | None,
    cfg_zero_star: bool,
) -> Tensor:
    """`combine` for float32 rows of which those that are off are None; scales may lie on the device."""
    pred = cond
    if uncond is not None:
        if cfg_zero_star:
            uncond = _projected(cond, uncond)
        pred = uncond + cfg_scale * (cond - uncond)
    if skip is not None:
        pred = pred + stg_scale * (cond - skip)
    if rescale is not None:
        pred = pred * (rescale * _std(cond) / _std(pred) + (1 - rescale))
    return pred


def _needed(pred: Tensor | None, name: str, scale: str, off: str) -> Tensor:
    if pred is None:
        raise InvalidRequest(
            f"{name}: expected a tensor for {scale}, got None: compute that pass or set it to {off}"
        )
    return pred


def _std(pred: Tensor) -> Tensor:
    """Unbiased standard deviation per video, shaped to broadcast."""
    return pred.std(dim=tuple(range(1, pred.ndim)), keepdim=True)


def _projected(cond: Tensor, uncond: Tensor) -> Tensor:
    """CFG-Zero* (arXiv 2503.18886): uncond * <cond, uncond> / (|uncond|^2 + 1e-8), per video."""
    dims = tuple(range(1, cond.ndim))
    dot = (cond * uncond).sum(dims, keepdim=True)
    return uncond * (dot / (uncond.square().sum(dims, keepdim=True) + 1e-8))
