"""`callback_on_step_end` as in diffusers: it may replace or edit the latents, and stop the run.

A model with sound has `audio_latents` beside the `latents`. `callback_on_video_end` gets each video as soon
as it is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest

from .output import VideoPipelineOutput

if TYPE_CHECKING:
    from .pipeline import VideoPipeline
    from .sampler import SampledStep

StepCallback = Callable[["VideoPipeline", int, float, dict[str, Tensor]], Mapping[str, Any] | None]

VideoCallback = Callable[["VideoPipeline", int, VideoPipelineOutput], None]
"""Called as callback(pipe, index, made), where `made` has one video: that of the index."""


def check_callback(
    callback: StepCallback | None, wanted: list[str] | None, offered: Sequence[str] = ("latents",)
) -> None:
    """Raises InvalidRequest if a callback wants other tensors than the latents that are `offered`.

    `wanted` is callback_on_step_end_tensor_inputs; diffusers' own callbacks name theirs in `tensor_inputs`.
    """
    names = [*(wanted or ()), *getattr(callback, "tensor_inputs", ())]
    others = sorted(set(names) - set(offered))
    if others:
        raise InvalidRequest(
            f"callback_on_step_end: expected it to work on latents alone, got one that wants "
            f"{', '.join(others)}: to change the guidance on the way, give guidance_scale, stg_scale and "
            "rescale one value per step"
        )


def call_back(pipeline: VideoPipeline, callback: StepCallback, step: SampledStep) -> None:
    """Calls it after a step; latents that it returns or has edited in place are those of the next step."""
    offered = step.of_streams
    shapes = {name: latents.shape for name, latents in offered.items()}
    answer = callback(pipeline, step.index, step.timestep, dict(offered))
    given = offered if answer is None else _latents_of(answer, offered)
    step.replace({name: _checked(latents, name, shapes[name]) for name, latents in given.items()})


def _latents_of(answer: object, offered: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not isinstance(answer, Mapping):
        raise InvalidRequest(
            f"callback_on_step_end: expected a dict or None in return, got {type(answer).__name__}: return "
            'the dict that it was given, or {"latents": latents}'
        )
    unknown = sorted(str(name) for name in answer.keys() - offered.keys())
    if unknown:
        raise InvalidRequest(
            f"callback_on_step_end: expected only {', '.join(offered)} in return, got {', '.join(unknown)}: "
            'return {"latents": latents}'
        )
    return {name: answer.get(name, latents) for name, latents in offered.items()}


def _checked(latents: object, name: str, shape: torch.Size) -> Tensor:
    if not isinstance(latents, Tensor):
        raise InvalidRequest(
            f"callback_on_step_end: expected {name} as a tensor in return, got {type(latents).__name__}: "
            "return the tensor that it was given, or one like it"
        )
    if latents.shape != shape or not latents.is_floating_point():
        raise InvalidRequest(
            f"callback_on_step_end: expected {name} {tuple(shape)} in return, got {latents.dtype} "
            f"{tuple(latents.shape)}: keep their shape, which is that of output_type='latent'"
        )
    return latents


def check_video_callback(callback: VideoCallback | None, output_type: str) -> None:
    """Raises InvalidRequest if a callback waits for videos that are not decoded."""
    if callback is not None and output_type == "latent":
        raise InvalidRequest(
            "callback_on_video_end: expected an output_type with frames (pil, np, pt), got 'latent': latents "
            "are all there at once, in the output"
        )


def shown_to(
    pipeline: VideoPipeline, callback: VideoCallback, audio: Tensor | None, sampling_rate: int | None
) -> Callable[[Any], None]:
    """Takes the frames of the videos in their order, and calls back with those and the sound of each."""
    indices = count()

    def show(frames: Any) -> None:
        index = next(indices)
        sound = None if audio is None else audio[index : index + 1]
        callback(pipeline, index, VideoPipelineOutput(frames, sound, sampling_rate))

    return show
