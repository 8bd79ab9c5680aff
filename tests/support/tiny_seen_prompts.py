"""Whole tiny HunyuanVideo-I2V checkpoints, with a text encoder that sees the picture."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoImageToVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizerFast,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.support.family_cases.hunyuan_video import (
    make_clip,
    make_clip_tokenizer,
    make_tokenizer,
    tiny_transformer,
    tiny_vae,
)
from tests.support.family_cases.tiny_text import TEXT_WIDTH

# Of the channels of its latents: as they are, or with those of the picture and a mask.
CHANNELS = {"token_replace": 4, "latent_concat": 9}
_CROP = int(DEFAULT_PROMPT_TEMPLATE["crop_start"])
_MARKER = re.compile(r"(<[^>]*>|\n\n)")


def checkpoint(folder: Path, kind: str) -> HunyuanVideoImageToVideoPipeline:
    """A checkpoint of one of the two kinds, and diffusers' pipeline of it."""
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = seeing_tokenizer(), make_clip_tokenizer()
    pipeline = HunyuanVideoImageToVideoPipeline(
        text_encoder=seeing_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=tiny_transformer(
            in_channels=CHANNELS[kind],
            guidance_embeds=kind == "token_replace",
            image_condition_type=kind,
        ),
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=make_clip(len(tokenizer_2)),
        tokenizer_2=tokenizer_2,
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
        ),
    )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeing_tokenizer() -> LlamaTokenizerFast:
    """The template's markers are a token each, and the text between them as many as the pipeline expects."""
    before, after = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")
    start, text = before.split("<image>")
    # Five tokens stand before the picture.
    head = ["<|start_header_id|>", "sys", "tem", "<|end_header_id|>", "\n\n", "<image>"]
    assert "".join(head) == f"{start}<image>"
    described, *rest = [piece for piece in _MARKER.split(text) if piece]
    wanted = _CROP - len(head) - len(rest)
    bounds = [*range(0, wanted * (len(described) // wanted), len(described) // wanted), len(described)]
    pieces = [described[first:last] for first, last in pairwise(bounds)]
    return make_tokenizer([*head, *pieces, *rest], [piece for piece in _MARKER.split(after) if piece])


def seeing_encoder(tokenizer: LlamaTokenizerFast) -> LlavaForConditionalGeneration:
    """As many tokens of a picture as the published one has, 24 x 24; three layers of text."""
    eyes = CLIPVisionConfig(
        hidden_size=16,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        intermediate_size=32,
        patch_size=2,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=eyes,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaForConditionalGeneration(config).eval()


def words_of(pipeline: Any, count: int) -> str:
    """A prompt of as many tokens, with those that end the template."""
    template = DEFAULT_PROMPT_TEMPLATE["template"]
    ends = len(pipeline.tokenizer(template.format("a")).input_ids) - _CROP - 1
    return " ".join(["a"] * (count - ends))
