"""Mochi 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLMochi,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    MochiPipeline,
    MochiTransformer3DModel,
)
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload
from tests.support.family_cases.case import GOLDENS, SMALL_TILES, TIMESTEP, FamilyCase, Grid, Published
from tests.support.family_cases.tiny_text import TEXT_WIDTH, make_text_encoder, make_tokenizer


def save_pipeline(folder: Path) -> None:
    """Mochi: 6 pixels in time and 8 in space per latent; empty prompts are zeros."""
    torch.manual_seed(0)
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        scaling_factor=0.8,
    )
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        pooled_projection_dim=16,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=32,
        max_sequence_length=64,
    )
    torch.nn.init.normal_(transformer.pos_frequencies)
    MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        text_encoder=make_text_encoder(T5Config, T5EncoderModel),
        tokenizer=make_tokenizer(),
        transformer=transformer,
        force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder)


def predict(model: Any, x: Tensor, condition: TextCondition) -> Tensor:
    output: Tensor = model(
        hidden_states=x,
        encoder_hidden_states=condition.embeds,
        timestep=torch.full((len(x),), TIMESTEP),
        encoder_attention_mask=condition.mask,
        return_dict=False,
    )[0]
    return output


def tables(model: Any, grid: Grid, frame_rate: float) -> dict[str, Tensor]:
    frames, height, width = grid
    return {"positions": model.rope._get_positions(frames, height // 2, width // 2, dtype=torch.float32)}


MOCHI = FamilyCase(
    goldens=GOLDENS / "mochi",
    sizes={"height": 48, "width": 64, "num_frames": 13, "text_length": 9},
    grid=(3, 6, 8),
    model_class=MochiTransformer3DModel,
    predict=predict,
    tables=tables,
    table_sizes=(
        ({"height": 48, "width": 64, "num_frames": 13}, (3, 6, 8)),
        ({"height": 16, "width": 32, "num_frames": 1}, (1, 2, 4)),
    ),
    video=slice(0, 36),
    padding="masked",
    mask_name="key_bias",
    # The angles of its positions reach 50, where float32 has steps of 4e-6.
    rounding=1e-5,
    golden_names=("stg_r_rescale",),
    cut_at=(2,),
    twins=(("stg-r", (2,)),),
    wide=("timestep_embedder", "pos_frequencies", "norm_q", "norm_added_k"),
    narrow=frozenset({"to_q", "add_k_proj", "patch_embed", "linear", "proj_out"}),
    refused_sizes=(
        ({"height": 40}, "height: expected a positive multiple of 16, got 40: use 32"),
        ({"width": 0}, "width: expected a positive multiple of 16, got 0: use 16"),
        ({"num_frames": 14}, "num_frames: expected 6k+1, got 14: use 13"),
        ({"num_frames": 0}, "num_frames: expected 6k+1, got 0: use 1"),
        ({"text_length": 0}, "text_length: expected a positive number of tokens, got 0: use 256"),
        ({"text_length": 10}, "text_length: expected at most 9 tokens, got 10: use 9"),
    ),
    refused=(
        (
            {"activation_fn": "gelu"},
            {},
            "activation_fn swiglu in transformer/config.json, as every",
        ),
        (
            {"out_channels": 24},
            {},
            "out_channels 12 in transformer/config.json, as every published",
        ),
        ({}, {"latent_channels": 16}, "latent_channels 12 in vae/config.json, as every published"),
        ({}, {"temporal_expansions": 6}, "temporal_expansions in vae/config.json as a list, got 6: download"),
        ({}, {"spatial_expansions": [2, "2"]}, "spatial_expansions in vae/config.json as a positive integer"),
        (
            {"patch_size": [1, 2, 2]},
            {},
            "patch_size in transformer/config.json as a positive integer",
        ),
        ({"pooled_projection_dim": 0}, {}, "pooled_projection_dim in transformer/config.json as a positive"),
    ),
    refused_indexes=(),
    refused_steps=(
        (FlowMatchEulerDiscreteScheduler(), 1, "num_inference_steps: expected at least 2, a linear and"),
        (DDIMScheduler(), 4, "scheduler: expected one that takes sigmas, as Mochi's pipeline gives them"),
    ),
    published=(
        Published(
            "mochi-1-preview",
            Workload(480, 848, 85, 256),
            (12, 15, 60, 106),
            (12, 15, 60, 106),
            teraflops=603.0,
        ),
    ),
    pipeline_class=MochiPipeline,
    save_pipeline=save_pipeline,
    schedulers=(FlowMatchEulerDiscreteScheduler(invert_sigmas=True),),
    vae_tiles=SMALL_TILES,
)
