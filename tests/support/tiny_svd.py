"""A whole tiny checkpoint of Stable Video Diffusion around the goldens' UNet."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.support.family_cases.case import GOLDENS

SVD = GOLDENS / "svd"


def save_svd(folder: Path) -> None:
    """The VAE and the image encoder have random weights."""
    torch.manual_seed(0)
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        latent_channels=4,
        layers_per_block=1,
    )
    eyes = CLIPVisionConfig(
        hidden_size=16,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,
        intermediate_size=32,
        patch_size=56,
    )
    pipeline = StableVideoDiffusionPipeline(
        vae=vae.eval(),
        image_encoder=CLIPVisionModelWithProjection(eyes).eval(),
        unet=UNetSpatioTemporalConditionModel.from_pretrained(SVD, subfolder="unet"),
        scheduler=EulerDiscreteScheduler.from_pretrained(SVD, subfolder="scheduler"),
        feature_extractor=CLIPImageProcessorPil(),
    )
    pipeline.save_pretrained(folder)
    for part in ("unet", "scheduler"):
        shutil.rmtree(folder / part)
        shutil.copytree(SVD / part, folder / part)


def diffusers_pipeline(folder: Path) -> Any:
    """diffusers' own pipeline."""
    pipeline = StableVideoDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
