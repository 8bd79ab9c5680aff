"""What a family's publishers sample with."""

from __future__ import annotations

from dataclasses import dataclass

from stg_trt.models.custom_steps import CustomSteps
from stg_trt.models.passes import SkipBlocksByName


@dataclass(frozen=True)
class Defaults:
    """A family's published sampling defaults (diffusers block numbering); `steps` of a distilled model.

    With a `min_guidance_scale`, CFG rises over a video's frames, from it to `guidance_scale`. The scales in
    `sound` are those of a model's sound.
    """

    stg_mode: str
    stg_blocks: tuple[int, ...] | SkipBlocksByName
    stg_scale: float
    guidance_scale: float
    rescale: float
    num_inference_steps: int
    frame_rate: float
    text_length: int
    embedded_guidance: float | None = None
    steps: CustomSteps | None = None
    min_guidance_scale: float | None = None
    modality_scale: float = 1.0
    sound: Defaults | None = None
