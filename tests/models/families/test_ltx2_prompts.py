"""LTX-2's prompts: Gemma's hidden states, and what the connectors make of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from safetensors.torch import load_file
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.families.ltx2_prompts import CONNECTORS, connect, count_tokens, encode_prompt
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload
from tests.support.family_cases.case import GOLDENS
from tests.support.tiny_ltx2 import EMBEDS_WIDTH, REGISTERS, gemma_tokenizer, text_pipeline, tiny_gemma

VERSIONS = ("ltx2", "ltx2_3")
CASE = "stg_modality_rescale"
PROMPTS = ["a red circle moving left", "  a\n"]


@cache
def golden(version: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(GOLDENS / version / f"{CASE}.safetensors")
    return tensors


@cache
def golden_connectors(version: str) -> Any:
    return LTX2TextConnectors.from_pretrained(GOLDENS / version, subfolder="connectors").eval()


def golden_text(version: str, prefix: str) -> TextCondition:
    tensors = golden(version)
    return TextCondition(tensors[f"{prefix}prompt_embeds"], tensors[f"{prefix}prompt_attention_mask"].float())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("prefix", ["", "negative_"])
@torch.no_grad()
def test_connectors_make_the_goldens(version: str, prefix: str) -> None:
    text = connect(golden_connectors(version), golden_text(version, prefix))
    expected = golden(version)
    assert text.audio is not None
    assert (text.embeds - expected[f"{prefix}connector_prompt_embeds"]).abs().max() <= 1e-5
    assert (text.audio - expected[f"{prefix}connector_audio_prompt_embeds"]).abs().max() <= 1e-5
    assert text.mask.shape == text.embeds.shape[:2] and bool(text.mask.all())


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_prompts_are_connected_apart(version: str) -> None:
    """Two with different padding give what each gives alone."""
    texts = [golden_text(version, prefix) for prefix in ("", "negative_")]
    assert not torch.equal(texts[0].mask, texts[1].mask)
    connectors = golden_connectors(version)
    both = connect(connectors, TextCondition.stacked(texts))
    apart = TextCondition.stacked([connect(connectors, text) for text in texts])
    assert both.audio is not None and apart.audio is not None
    assert (both.embeds - apart.embeds).abs().max() <= 1e-5
    assert (both.audio - apart.audio).abs().max() <= 1e-5


@pytest.mark.parametrize("version", VERSIONS)
def test_the_text_length_is_a_multiple_of_the_registers(version: str) -> None:
    text = TextCondition(torch.ones(1, 6, EMBEDS_WIDTH), torch.ones(1, 6))
    with pytest.raises(
        InvalidRequest,
        match=r"text_length: expected a multiple of 4, .*, got 6: rebuild with --text-length 8",
    ):
        connect(golden_connectors(version), text)


@torch.no_grad()
def test_embeddings_are_all_hidden_states_padded_on_the_left() -> None:
    """Of the prompt without the spaces around it."""
    pipeline, length = text_pipeline(), 2 * REGISTERS
    text = encode_prompt(pipeline, PROMPTS, Workload(64, 64, 9, length))
    assert text.embeds.shape == (2, length, EMBEDS_WIDTH)
    counts = [count_tokens(pipeline, prompt) for prompt in PROMPTS]
    assert counts == [6, 2]
    assert text.mask.tolist() == [[0.0] * (length - count) + [1.0] * count for count in counts]
    for row, (prompt, count) in enumerate(zip(PROMPTS, counts, strict=True)):
        ids = torch.tensor([gemma_tokenizer()(prompt.strip()).input_ids])
        states = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states
        expected = torch.stack(states, -1).flatten(2)
        assert (text.embeds[row, -count:] - expected).abs().max() <= 1e-5


def test_the_width_is_that_of_all_hidden_states() -> None:
    assert CONNECTORS.width(tiny_gemma(50).config) == EMBEDS_WIDTH
