"""Tiny checkpoints of two experts, without text encoders, and diffusers' pipelines of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    WanImageToVideoPipeline,
    WanPipeline,
)

from tests.support.tiny_wan import tiny_wan, unipc

# A timestep of UniPC's four with a shift of 3, so that one step lies on the boundary.
STEPS, BOUNDARY = 4, 0.9
TEXT = (9, 24)


def two_experts(
    folder: Path, *, image: bool = False, scheduler: Any = None, boundary: float = BOUNDARY
) -> Any:
    """Two transformers of one configuration and other weights; for pictures with more input channels."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 0.8])
    channels = 12 if image else 4
    pipeline_class = WanImageToVideoPipeline if image else WanPipeline
    pipeline = pipeline_class(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=tiny_wan(in_channels=channels),
        transformer_2=tiny_wan(in_channels=channels),
        scheduler=scheduler or unipc(3.0),
        boundary_ratio=boundary,
    )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
