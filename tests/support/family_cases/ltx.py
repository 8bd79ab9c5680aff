"""LTX-Video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload
from tests.support.family_cases.case import GOLDENS, TIMESTEP, FamilyCase, Grid, Published
from tests.support.family_cases.tiny_text import TEXT_WIDTH, make_text_encoder, make_tokenizer


def save_pipeline(folder: Path) -> None:
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
        attention_head_dim=16,
        cross_attention_dim=32,
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


def predict(model: Any, x: Tensor, condition: TextCondition) -> Tensor:
    output: Tensor = model(
        hidden_states=x,
        encoder_hidden_states=condition.embeds,
        timestep=torch.full((len(x),), TIMESTEP),
        encoder_attention_mask=condition.mask,
        num_frames=3,
        height=4,
        width=5,
        rope_interpolation_scale=(8 / 25, 32, 32),
        return_dict=False,
    )[0]
    return output


def tables(model: Any, grid: Grid, frame_rate: float) -> dict[str, Tensor]:
    cos, sin = model.rope(torch.zeros(1, 1), *grid, (8 / frame_rate, 32, 32))
    return {"rope_cos": cos[0], "rope_sin": sin[0]}


LTX = FamilyCase(
    goldens=GOLDENS / "ltx",
    sizes={"height": 128, "width": 160, "num_frames": 17, "text_length": 9},
    grid=(3, 4, 5),
    model_class=LTXVideoTransformer3DModel,
    predict=predict,
    tables=tables,
    table_sizes=(
        ({"height": 128, "width": 160, "num_frames": 17}, (3, 4, 5)),
        ({"height": 32, "width": 64, "num_frames": 1}, (1, 1, 2)),
    ),
    video=None,
    padding="masked",
    mask_name="text_bias",
    golden_names=("cfg", "stg_r", "stg_a_rescale", "stg_r_no_cfg"),
    cut_at=(1, 3),
    twins=(("stg-a", (3,)), ("stg-r", (3,))),
    wide=("time_embed", "scale_shift_table", "norm_q"),
    narrow=frozenset({"to_q", "to_k", "to_v", "proj_in", "proj_out"}),
    refused_sizes=(
        ({"height": 100}, "height: expected a positive multiple of 32, got 100: use 96"),
        ({"width": 0}, "width: expected a positive multiple of 32, got 0: use 32"),
        ({"width": -64}, "width: expected a positive multiple of 32, got -64: use 32"),
        ({"num_frames": 16}, "num_frames: expected 8k+1, got 16: use 17"),
        ({"num_frames": 0}, "num_frames: expected 8k+1, got 0: use 1"),
        ({"text_length": 0}, "text_length: expected a positive number of tokens, got 0: use 128"),
    ),
    refused=(
        ({"patch_size": 2}, {}, "expected patch_size 1 in transformer/config.json, as in every published"),
        ({"num_layers": "5"}, {}, "expected num_layers in transformer/config.json as a positive integer"),
    ),
    refused_indexes=(),
    published=(
        Published(
            "ltx-video-2b", Workload(480, 704, 121, 256), (128, 16, 15, 22), (5280, 128), teraflops=24.2
        ),
        Published(
            "ltx-video-2b", Workload(704, 1216, 121, 256), (128, 16, 22, 38), (13376, 128), teraflops=85.9
        ),
        Published(
            "ltx-video-13b", Workload(480, 704, 121, 256), (128, 16, 15, 22), (5280, 128), teraflops=142.9
        ),
    ),
    pipeline_class=LTXPipeline,
    save_pipeline=save_pipeline,
    schedulers=(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),),
    vae_tiles={
        "tile_sample_min_height": 96,
        "tile_sample_min_width": 64,
        "tile_sample_stride_height": 64,
        "tile_sample_stride_width": 32,
    },
    # The timesteps of all tokens are embedded in one product, which rounds otherwise than that of one.
    rounding=3e-6,
    noisy_vae={"timestep_conditioning": True},
    decode_options={"decode_timestep": 0.05, "decode_noise_scale": 0.5},
)
