"""`callback_on_step_end` as in diffusers: it may replace or edit the latents, and stop the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest

if TYPE_CHECKING:
    from .pipeline import VideoPipeline
    from .sampler import SampledStep

StepCallback = Callable[["VideoPipeline", int, float, dict[str, Tensor]], Mapping[str, Any] | None]
_OFFERED = ("latents",)


def check_callback(callback: StepCallback | None, wanted: list[str] | None) -> None:
    """Raises InvalidRequest if a callback wants other tensors than the latents.

    `wanted` is callback_on_step_end_tensor_inputs; diffusers' own callbacks name theirs in `tensor_inputs`.
    """
    names = [*(wanted or ()), *getattr(callback, "tensor_inputs", ())]
    others = sorted(set(names) - set(_OFFERED))
    if others:
        raise InvalidRequest(
            f"callback_on_step_end: expected it to work on latents alone, got one that wants "
            f"{', '.join(others)}: to change the guidance on the way, give guidance_scale, stg_scale and "
            "rescale one value per step"
        )


def call_back(pipeline: VideoPipeline, callback: StepCallback, step: SampledStep) -> None:
    """Calls it after a step; latents that it returns or has edited in place are those of the next step."""
    offered = step.latents
    shape = offered.shape
    answer = callback(pipeline, step.index, step.timestep, {"latents": offered})
    step.latents = _checked(offered if answer is None else _latents_of(answer, offered), shape)


def _latents_of(answer: object, offered: Tensor) -> Tensor:
    if not isinstance(answer, Mapping):
        raise InvalidRequest(
            f"callback_on_step_end: expected a dict or None in return, got {type(answer).__name__}: return "
            'the dict that it was given, or {"latents": latents}'
        )
    unknown = sorted(str(name) for name in answer.keys() - set(_OFFERED))
    if unknown:
        raise InvalidRequest(
            f"callback_on_step_end: expected only latents in return, got {', '.join(unknown)}: return "
            '{"latents": latents}'
        )
    latents = answer.get("latents", offered)
    if not isinstance(latents, Tensor):
        raise InvalidRequest(
            f"callback_on_step_end: expected latents as a tensor in return, got {type(latents).__name__}: "
            "return the tensor that it was given, or one like it"
        )
    return latents


def _checked(latents: Tensor, shape: torch.Size) -> Tensor:
    if latents.shape != shape or not latents.is_floating_point():
        raise InvalidRequest(
            f"callback_on_step_end: expected latents {tuple(shape)} in return, got {latents.dtype} "
            f"{tuple(latents.shape)}: keep their shape, which is that of output_type='latent'"
        )
    return latents
