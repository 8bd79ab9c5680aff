"""Whole tiny image-to-video checkpoints without text encoders, and diffusers' pipelines of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    WanImageToVideoPipeline,
)
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.support.family_cases.cogvideox import SCHEDULE, tiny_transformer, tiny_vae
from tests.support.tiny_wan import tiny_wan, unipc


def cogvideox_1_5(folder: Path) -> Any:
    """Patches of two latents in time, and an input `ofs`; the VAE divides by its factor."""
    torch.manual_seed(0)
    vae = tiny_vae(invert_scale_latents=True)
    transformer = tiny_transformer(
        in_channels=8,
        text_embed_dim=24,
        ofs_embed_dim=16,
        patch_size_t=2,
        patch_bias=False,
        use_rotary_positional_embeddings=True,
    )
    pipeline = CogVideoXImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDPMScheduler(**SCHEDULE, snr_shift_scale=1.0),
    )
    return _saved(pipeline, folder)


def wan_first_last(folder: Path) -> Any:
    """Wan 2.1 for a first and a last picture, whose CLIP tokens have learned positions."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 0.8])
    eyes = CLIPVisionConfig(
        hidden_size=16,
        projection_dim=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        intermediate_size=32,
        patch_size=4,
    )
    transformer = tiny_wan(in_channels=12, image_dim=16, added_kv_proj_dim=24, pos_embed_seq_len=10)
    torch.nn.init.normal_(transformer.condition_embedder.image_embedder.pos_embed)
    pipeline = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=unipc(3.0),
        image_encoder=CLIPVisionModelWithProjection(eyes).eval(),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
    )
    return _saved(pipeline, folder)


def wan_ti2v(folder: Path) -> Any:
    """Wan 2.2 TI2V: a timestep per token, and a VAE that first cuts pixels into patches."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 1.3, 0.8],
    )
    transformer = tiny_wan()
    pipeline = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=unipc(5.0),
        expand_timesteps=True,
    )
    return _saved(pipeline, folder)


def _saved(pipeline: Any, folder: Path) -> Any:
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
