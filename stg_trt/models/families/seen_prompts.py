"""Prompts read by a text encoder that sees a picture, of which it makes tokens before those of the text."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from torch.nn.functional import pad

from stg_trt.errors import InvalidRequest
from stg_trt.models.text import TextCondition

# The most of a picture's tokens that diffusers' pipeline keeps, and the text's last ones, which it cuts out.
_PICTURE_TOKENS = 288
_CUT_TOKENS = 4


def tokens_in_template(pipeline: Any, prompt: str) -> int:
    """How many tokens a prompt takes, with those that a diffusers pipeline writes after it."""
    template = _template(pipeline)
    tokens = pipeline.tokenizer(template["template"].format(prompt)).input_ids
    return len(tokens) - int(template["crop_start"])


def room_beside_picture(text_length: int) -> int:
    """diffusers' max_sequence_length with which text and picture together have a text length."""
    return max(text_length - _PICTURE_TOKENS + _CUT_TOKENS, 0)


def encode_beside_pictures(
    pipeline: Any, prompts: Sequence[str], pictures: Sequence[Any], interleave: int, text_length: int
) -> TextCondition:
    """Prompts with a picture each, or one for all; `interleave` is how many of its tokens count as one.

    One prompt after the other, since diffusers' pipeline finds the end of a text by its place among those of
    the batch.
    """
    each = [*pictures] * len(prompts) if len(pictures) == 1 else pictures
    return TextCondition.stacked([
        _encoded(pipeline, prompt, picture, interleave, text_length)
        for prompt, picture in zip(prompts, each, strict=True)
    ])  # fmt: skip


def check_seeing(pipeline: Any) -> None:
    """Raises InvalidRequest for an encoder that sees nothing, or a tokenizer that shows it no picture."""
    encoder, template = pipeline.text_encoder, _template(pipeline)
    shown = getattr(encoder.config, "image_token_index", None)
    if shown is None:
        raise InvalidRequest(
            "checkpoint: expected a text_encoder/ that sees pictures, such as LlavaForConditionalGeneration, "
            f"got {type(encoder).__name__}: give the whole image-to-video checkpoint"
        )
    place = int(template["image_emb_start"])
    found = pipeline.tokenizer(template["template"]).input_ids[place]
    if found != shown:
        raise InvalidRequest(
            f"checkpoint: expected a tokenizer/ that writes the picture's token {shown} at place {place} of "
            f"the prompt's template, got {found}: the folder mixes two models; download it again"
        )


def _encoded(pipeline: Any, prompt: str, picture: Any, interleave: int, text_length: int) -> TextCondition:
    embeds, pooled, mask = pipeline.encode_prompt(
        picture,
        prompt,
        device=pipeline.text_encoder.device,
        max_sequence_length=room_beside_picture(text_length),
        image_embed_interleave=interleave,
    )
    missing = text_length - embeds.shape[1]
    return TextCondition(pad(embeds, (0, 0, 0, missing)), pad(mask, (0, missing)), pooled)


def _template(pipeline: Any) -> dict[str, Any]:
    """What the pipeline writes around a prompt, and where it cuts that off again."""
    template: dict[str, Any] = import_module(type(pipeline).__module__).DEFAULT_PROMPT_TEMPLATE
    return template
