"""Whole checkpoints of the real classes, small and random, text encoder and VAE included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, T5TokenizerFast, UMT5Config, UMT5EncoderModel

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


def save_ltx(folder: Path) -> None:
    """LTX-Video: 8 pixels in time and 32 in space per latent."""
    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    vae.latents_mean, vae.latents_std = torch.linspace(-0.5, 0.5, 8), torch.linspace(0.5, 2.0, 8)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=3,
        caption_channels=TEXT_WIDTH,
    )
    LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=make_text_encoder(T5Config, T5EncoderModel),
        tokenizer=make_tokenizer(),
        transformer=transformer,
    ).save_pretrained(folder)


def save_wan(folder: Path) -> None:
    """Wan: 4 pixels in time and 8 in space per latent."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.7, 0.1, 0.4, 0.9],
        latents_std=[2.8, 1.4, 2.3, 0.7],
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=48,
        num_layers=3,
        rope_max_seq_len=32,
    )
    WanPipeline(
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=vae,
        text_encoder=make_text_encoder(UMT5Config, UMT5EncoderModel),
        tokenizer=make_tokenizer(),
        transformer=transformer,
    ).save_pretrained(folder)
