"""Arguments of diffusers' and of the published STG pipelines that have other names here, or no meaning.

Sources: diffusers' text-to-video pipelines; the STG pipelines beside arXiv 2411.18664.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.guidance.bins import Scale, SkipBlocks, SkipScales
from stg_trt.guidance.options import AsVideo
from stg_trt.models.image import ImageOptions

# The published STG pipelines rescale by this where do_rescaling is set.
_RESCALE = 0.7
_OURS = {
    "stg_applied_layers_idx": "stg_blocks",
    "spatio_temporal_guidance_blocks": "stg_blocks",
    "guidance_rescale": "rescale",
    "do_rescaling": "rescale",
    "fps": "frame_rate",
}
_SOUND_SCALES = {
    "audio_guidance_scale": "audio_guidance_scale",
    "audio_stg_scale": "audio_stg_scale",
    "audio_modality_scale": "audio_modality_scale",
    "audio_guidance_rescale": "audio_rescale",
}
# A value that changes nothing is taken, since calls are copied with it.
_WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "return_dict": (True, "read .frames of the answer"),
    "attention_kwargs": (None, "LoRA scales belong to the build"),
    "joint_attention_kwargs": (None, "LoRA scales belong to the build"),
    "eta": (0.0, "choose a scheduler that adds noise"),
    "prompt_2": (None, "both text encoders read prompt"),
    "negative_prompt_2": (None, "both text encoders read negative_prompt"),
    "use_cross_timestep": (True, "False is that of no published checkpoint"),
    "enable_prompt_enhancement": (False, "enhance the prompt before the call"),
}


@dataclass(frozen=True)
class ForeignArguments:
    """The arguments of a call under names of other pipelines, or for some models; the rest are for decoding.

    `frame_scales` are the CFG scales of the first and the last frame. `sound` are the scales of a model with
    sound, by their names in GuidanceOptions.
    """

    stg_blocks: SkipBlocks | None
    rescale: Scale | None
    guidance_scale_2: Scale | None
    max_sequence_length: int | None
    callback_tensors: list[str] | None
    frame_scales: tuple[float | None, float | None]
    frame_rate: float | None
    images: ImageOptions
    sound: dict[str, Scale | SkipScales | AsVideo]
    audio_latents: Tensor | None
    noise_scale: float
    motion_speed: float
    decode_options: dict[str, Any]

    @classmethod
    def read(
        cls,
        given: Mapping[str, Any],
        stg_blocks: SkipBlocks | None,
        rescale: Scale | None,
        frame_rate: float | None,
    ) -> ForeignArguments:
        """Sorts what a call was given beside our own arguments; raises InvalidRequest for two of one meaning.

        Those of ours that have other names too are None if they were left out.
        """
        rest = dict(given)
        for name, (neutral, instead) in _WITHOUT_EFFECT.items():
            value = rest.pop(name, neutral)
            if value is not neutral and value != neutral:
                raise InvalidRequest(f"{name}: expected {neutral}, got {value!r}: {instead}")
        values: dict[str, Any] = {"stg_blocks": stg_blocks, "rescale": rescale, "frame_rate": frame_rate}
        for name, own in _OURS.items():
            value = rest.pop(name, None)
            if value is None:
                continue
            if values[own] is not None:
                raise InvalidRequest(f"{name}: expected {own} under one name, got two: leave {name} out")
            values[own] = (_RESCALE if value else 0.0) if name == "do_rescaling" else value
        return cls(
            values["stg_blocks"],
            values["rescale"],
            rest.pop("guidance_scale_2", None),
            rest.pop("max_sequence_length", None),
            rest.pop("callback_on_step_end_tensor_inputs", None),
            (rest.pop("min_guidance_scale", None), rest.pop("max_guidance_scale", None)),
            values["frame_rate"],
            ImageOptions(**{f.name: rest.pop(f.name, None) for f in fields(ImageOptions)}),
            _sound_scales(rest),
            rest.pop("audio_latents", None),
            _number("noise_scale", rest.pop("noise_scale", 0.0), 0.0, 1.0),
            _number("motion_speed", rest.pop("motion_speed", 1.0), 0.0, math.inf),
            rest,
        )


def _sound_scales(rest: dict[str, Any]) -> dict[str, Scale | SkipScales | AsVideo]:
    """Those of a model with sound, taken out; where diffusers' pipeline gets None, it takes the video's."""
    given = {own: rest.pop(name) for name, own in _SOUND_SCALES.items() if name in rest}
    scales = {own: "video" if scale is None else scale for own, scale in given.items()}
    modality = rest.pop("modality_scale", None)
    return scales if modality is None else {"modality_scale": modality, **scales}


def _number(name: str, value: object, low: float, high: float) -> float:
    if not isinstance(value, Real) or not low <= float(value) <= high:
        upper = "" if high == math.inf else f" to {high:g}"
        raise InvalidRequest(f"{name}: expected a number from {low:g}{upper}, got {value!r}: correct it")
    return float(value)
