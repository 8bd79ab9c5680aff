"""LTX-2's prompts: the hidden states of all of Gemma's layers, and what the connectors make of them."""

from __future__ import annotations

from typing import Any

from stg_trt.errors import InvalidRequest
from stg_trt.models.text import Connector, TextCondition
from stg_trt.models.workload import Workload


def encode_prompt(pipeline: Any, prompts: list[str], workload: Workload) -> TextCondition:
    """Embeddings before the connectors (videos, tokens, hidden states of all layers), padded on the left."""
    device = pipeline.text_encoder.device
    return TextCondition(
        *pipeline._get_gemma_prompt_embeds(prompts, max_sequence_length=workload.text_length, device=device)
    )


def count_tokens(pipeline: Any, prompt: str) -> int:
    """Those of the prompt without the spaces around it, which the pipeline strips."""
    return len(pipeline.tokenizer(prompt.strip()).input_ids)


def connect(connectors: Any, text: TextCondition) -> TextCondition:
    """Embeddings for video and sound, whose padding learned registers have replaced: all are real tokens."""
    tokens = text.embeds.shape[1]
    for connector in (connectors.video_connector, connectors.audio_connector):
        registers = connector.num_learnable_registers
        if registers is not None and tokens % registers:
            raise InvalidRequest(
                f"text_length: expected a multiple of {registers}, as many as connectors/ has registers, got "
                f"{tokens}: rebuild with --text-length {-(-tokens // registers) * registers}"
            )
    embeds, audio, mask = connectors(text.embeds, text.mask.long(), padding_side="left")
    return TextCondition(embeds, mask.float(), audio=audio)


def _width(config: Any) -> int:
    """Of the hidden states of the embedding and of every layer, side by side."""
    text = config.get_text_config()
    return int(text.hidden_size * (text.num_hidden_layers + 1))


CONNECTORS = Connector("connectors", connect, _width, pads_left=True)
