"""Tokenizers and text encoders of the real classes, small and random."""

from __future__ import annotations

from typing import Any

from transformers import T5TokenizerFast

WORDS = ("a", "red", "blue", "circle", "square", "&", "moving", "left", "blurred")
TEXT_WIDTH = 24


def make_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer whose pieces are whole words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [("\u2581" + word, -1.0) for word in WORDS]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=64)


def make_text_encoder(config_class: type, encoder_class: type) -> Any:
    """A one-layer encoder of the T5 kind."""
    return encoder_class(
        config_class(
            vocab_size=len(WORDS) + 3,
            d_model=TEXT_WIDTH,
            d_kv=12,
            d_ff=48,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )
