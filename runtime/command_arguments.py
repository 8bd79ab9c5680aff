"""The texts and files of the command line, as the arguments of a call."""

from __future__ import annotations

from dataclasses import replace
from mimetypes import guess_type
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

if TYPE_CHECKING:
    from torch import Tensor

    from stg_trt.guidance.bins import Scale, SkipScales


Condition = dict[str, str | int | float]
"""An entry of the pipeline's `conditions`."""


class EmbedsFile(TypedDict, total=False):
    """The tensors that `--embeds` may hold, by the names of the pipeline's arguments."""

    prompt_embeds: Tensor
    prompt_attention_mask: Tensor
    pooled_prompt_embeds: Tensor
    negative_prompt_embeds: Tensor
    negative_prompt_attention_mask: Tensor
    negative_pooled_prompt_embeds: Tensor
    latents: Tensor
    audio_latents: Tensor
    image_embeddings: Tensor
    image_latents: Tensor


EMBEDS = tuple(EmbedsFile.__annotations__)


def read_options(
    embeds: Path | None,
    *,
    guidance_scale: str | None,
    guidance_scale_2: str | None,
    true_cfg_scale: str | None,
    stg_scale: list[str] | None,
    stg_mode: str | None,
    stg_blocks: list[str] | None,
    rescale: str | None,
    preset: str | None,
    use_dynamic_cfg: bool,
    min_guidance_scale: float | None,
    max_guidance_scale: float | None,
    timesteps: str | None,
    sigmas: str | None,
    condition: list[str] | None = None,
    sound: list[str] | None = None,
    **others: object,
) -> dict[str, Any]:
    """Guidance, steps, tensors and all else of a call, by the names of the pipeline's arguments.

    `others` are passed on as they are, if they were given. Raises InvalidRequest for
    what are no numbers, names of nothing, and a file that is not one of `--embeds`.
    """
    from stg_trt.guidance.options import GuidanceOptions
    from stg_trt.models.passes import parse_by_pass
    from stg_trt.models.perturbation import parse_blocks

    guidance = GuidanceOptions(
        guidance_scale=_scale("guidance_scale", guidance_scale),
        stg_scale=_skip_scales(stg_scale),
        rescale=_scale("rescale", rescale),
        stg_mode=stg_mode,
        stg_blocks=parse_by_pass("stg_blocks", stg_blocks, parse_blocks),
        preset=preset,
        use_dynamic_cfg=use_dynamic_cfg,
        true_cfg_scale=_scale("true_cfg_scale", true_cfg_scale),
        guidance_scale_2=_scale("guidance_scale_2", guidance_scale_2),
        min_guidance_scale=min_guidance_scale,
        max_guidance_scale=max_guidance_scale,
    )
    guidance = replace(guidance, **_sound_scales(sound or []))
    tensors: EmbedsFile = {} if embeds is None else read_embeds(embeds)
    return {
        "guidance": guidance,
        "timesteps": read_numbers("timesteps", timesteps),
        "sigmas": read_numbers("sigmas", sigmas),
        "conditions": read_conditions(condition),
        **tensors,
        **{name: value for name, value in others.items() if value is not None},
    }


def _sound_scales(texts: list[str]) -> dict[str, Any]:
    """NAME=SCALE each, by the names of GuidanceOptions; raises InvalidRequest for other names."""
    from stg_trt.errors import InvalidRequest
    from stg_trt.guidance.options import SCALES_OF_SOUND

    names = ("modality_scale", *SCALES_OF_SOUND)
    pairs = [text.partition("=") for text in texts]
    for name, _, value in pairs:
        if name not in names:
            raise InvalidRequest(
                f"sound: expected NAME=SCALE with one of {', '.join(names)}, got {name}={value}: write "
                "audio_guidance_scale=7"
            )
    return {name: _one_or_more(name, value) for name, _, value in pairs}


def _scale(name: str, text: str | None) -> Scale | None:
    """A number, or a list of them separated by commas."""
    return None if text is None else _one_or_more(name, text)


def _skip_scales(texts: list[str] | None) -> SkipScales | None:
    """The scale of all skip passes, or NAME=SCALE for each."""
    from stg_trt.models.passes import parse_by_pass

    return parse_by_pass("stg_scale", texts, lambda text: _one_or_more("stg_scale", text))


def _one_or_more(name: str, text: str) -> Scale:
    values = read_numbers(name, text)
    assert values is not None
    return values[0] if len(values) == 1 else values


def read_numbers(name: str, text: str | None) -> list[float] | None:
    """Numbers separated by commas."""
    from stg_trt.errors import InvalidRequest

    if text is None:
        return None
    try:
        return [float(value) for value in text.split(",")]
    except ValueError as error:
        raise InvalidRequest(
            f"{name}: expected a number, or one per step separated by commas, got {text!r}: correct it"
        ) from error


def read_conditions(texts: list[str] | None) -> list[Condition] | None:
    """Pictures or videos, FILE@FRAME:STRENGTH each, where frame and strength may be left out.

    Raises InvalidRequest for a frame or a strength that is no number.
    """
    return [_condition(text) for text in texts] if texts else None


def _condition(text: str) -> Condition:
    from stg_trt.errors import InvalidRequest

    file, at, place = text.rpartition("@")
    frame, _, strength = place.partition(":")
    try:
        first, kept = int(frame) if at else 0, float(strength) if at and strength else 1.0
    except ValueError as error:
        raise InvalidRequest(
            f"condition: expected FILE@FRAME:STRENGTH, such as end.png@120:0.9, got {text!r}: correct it"
        ) from error
    kind, _ = guess_type(file if at else text)
    shown = "video" if kind is not None and kind.startswith("video/") else "image"
    return {shown: file if at else text, "frame_index": first, "strength": kept}


def read_embeds(path: Path) -> EmbedsFile:
    """Raises InvalidRequest for a file that is not safetensors, or has other tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from stg_trt.errors import InvalidRequest

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidRequest(
            f"embeds: expected a safetensors file, got {path} ({error}): check it"
        ) from error
    unknown = sorted(tensors.keys() - set(EMBEDS))
    if unknown:
        raise InvalidRequest(
            f"embeds: expected tensors {', '.join(EMBEDS)}, got also {', '.join(unknown)}: leave those out"
        )
    return cast(EmbedsFile, tensors)
