"""The scales, blocks and steps of LTX-2, of diffusers' LTX2Pipeline, and of its distilled checkpoints."""

from __future__ import annotations

from dataclasses import replace

from stg_trt.models.custom_steps import CustomSteps
from stg_trt.models.defaults import Defaults

# Lightricks' distilled schedule, DISTILLED_SIGMA_VALUES of diffusers' pipelines/ltx2/utils.py.
_DISTILLED = CustomSteps("sigmas", (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875))
_VIDEO = Defaults(
    stg_mode="stg-a",
    stg_blocks=(28,),
    stg_scale=1.0,
    guidance_scale=3.0,
    rescale=0.7,
    num_inference_steps=30,
    frame_rate=24.0,
    text_length=1024,
    modality_scale=3.0,
)
DEFAULTS = replace(_VIDEO, sound=replace(_VIDEO, guidance_scale=7.0))


def of_blocks(defaults: Defaults, blocks: tuple[int, ...]) -> Defaults:
    """Those of a model whose STG skips other blocks."""
    assert defaults.sound is not None
    return replace(defaults, stg_blocks=blocks, sound=replace(defaults.sound, stg_blocks=blocks))


def unguided(defaults: Defaults) -> Defaults:
    """Those of a distilled model: its steps, one pass each."""
    off = replace(
        defaults,
        guidance_scale=1.0,
        stg_scale=0.0,
        modality_scale=1.0,
        rescale=0.0,
        num_inference_steps=len(_DISTILLED.values),
        steps=_DISTILLED,
        sound=None,
    )
    return replace(off, sound=off)
