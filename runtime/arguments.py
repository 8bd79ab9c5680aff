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
from stg_trt.guidance.bins import Scale, SkipBlocks
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.image import ImageOptions
from stg_trt.models.stream import SOUND

# The published STG pipelines rescale by this where do_rescaling is set.
_RESCALE = 0.7
_OURS = {
    "stg_applied_layers_idx": "stg_blocks",
    "spatio_temporal_guidance_blocks": "stg_blocks",
    "guidance_rescale": "rescale",
    "do_rescaling": "rescale",
    "fps": "frame_rate",
}
_RARE_SCALES = ("min_guidance_scale", "max_guidance_scale", "guidance_scale_2", "modality_scale")
_SOUND_SCALES = {
    "audio_guidance_scale": "audio_guidance_scale",
    "audio_stg_scale": "audio_stg_scale",
    "audio_modality_scale": "audio_modality_scale",
    "audio_rescale": "audio_rescale",
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
class SoundArguments:
    """How a run of a model with sound starts.

    `noise_scale` is the share of noise in latents that are given. The model is told a frame rate that is
    divided by `motion_speed`.
    """

    latents: Tensor | None = None
    noise_scale: float = 0.0
    motion_speed: float = 1.0

    @property
    def given(self) -> tuple[str, ...]:
        """The names, in calls, of those that a model without sound has no use for."""
        latents = () if self.latents is None else ("audio_latents",)
        numbers = {"noise_scale": self.noise_scale != 0, "motion_speed": self.motion_speed != 1}
        return (*latents, *(name for name, is_given in numbers.items() if is_given))

    @classmethod
    def taken_from(cls, rest: dict[str, Any]) -> SoundArguments:
        """Takes them out of a call's arguments; raises InvalidRequest for what is no number."""
        return cls(
            rest.pop("audio_latents", None),
            _number("noise_scale", rest.pop("noise_scale", 0.0), 0.0, 1.0),
            _number("motion_speed", rest.pop("motion_speed", 1.0), 1e-6, math.inf),
        )


@dataclass(frozen=True)
class ForeignArguments:
    """The arguments of a call under names of other pipelines, or for some models; the rest are for decoding.

    `scales` are those of single models, by their names in GuidanceOptions.
    """

    stg_blocks: SkipBlocks | None
    rescale: Scale | None
    scales: dict[str, Any]
    max_sequence_length: int | None
    callback_tensors: list[str] | None
    frame_rate: float | None
    images: ImageOptions
    sound: SoundArguments
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
            _scales(rest),
            rest.pop("max_sequence_length", None),
            rest.pop("callback_on_step_end_tensor_inputs", None),
            values["frame_rate"],
            ImageOptions(**{f.name: rest.pop(f.name, None) for f in fields(ImageOptions)}),
            SoundArguments.taken_from(rest),
            rest,
        )

    def check(self, family: ModelFamily, videos: int) -> None:
        """Raises InvalidRequest for arguments that the family does not have, and for values it cannot use."""
        unknown = self.decode_options.keys() - family.decode_options
        unknown |= {*self.images.given} - family.image_options
        unknown |= set() if SOUND in family.streams else {*self.sound.given}
        if unknown:
            raise InvalidRequest(
                f"arguments: expected those of VideoPipeline, got {', '.join(sorted(unknown))}: "
                "check the spelling"
            )
        family.check_decode_options(self.decode_options)
        for name, value in self.decode_options.items():
            if isinstance(value, list | tuple) and len(value) != videos:
                raise InvalidRequest(
                    f"{name}: expected one number or {videos}, got {len(value)}: give one per video"
                )


def _scales(rest: dict[str, Any]) -> dict[str, Any]:
    """The scales of single models, taken out; for None of a sound, diffusers' pipeline takes the video's."""
    if {"audio_rescale", "audio_guidance_rescale"} <= rest.keys():
        raise InvalidRequest(
            "audio_guidance_rescale: expected audio_rescale under one name, got two: leave one of them out"
        )
    of_sound = {own: rest.pop(name) for name, own in _SOUND_SCALES.items() if name in rest}
    return {
        **{name: rest.pop(name) for name in _RARE_SCALES if name in rest},
        **{own: "video" if scale is None else scale for own, scale in of_sound.items()},
    }


def _number(name: str, value: object, low: float, high: float) -> float:
    if not isinstance(value, Real) or not low <= float(value) <= high:
        upper = " on" if high == math.inf else f" to {high:g}"
        raise InvalidRequest(f"{name}: expected a number from {low:g}{upper}, got {value!r}: correct it")
    return float(value)
