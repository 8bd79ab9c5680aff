"""Wan 2.1; Wan 2.2 A14B has the same transformer twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload
from tests.support.family_cases.case import GOLDENS, SMALL_TILES, TIMESTEP, FamilyCase, Grid, Published
from tests.support.family_cases.tiny_text import TEXT_WIDTH, make_text_encoder, make_tokenizer


def save_pipeline(folder: Path) -> None:
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


def predict(model: Any, x: Tensor, condition: TextCondition) -> Tensor:
    output: Tensor = model(
        hidden_states=x,
        timestep=torch.full((len(x),), TIMESTEP),
        encoder_hidden_states=condition.embeds * condition.mask[:, :, None],
        return_dict=False,
    )[0]
    return output


def tables(model: Any, grid: Grid, frame_rate: float) -> dict[str, Tensor]:
    cos, sin = model.rope(torch.zeros(1, 4, *grid))
    return {"rope_cos": cos[0, :, 0], "rope_sin": sin[0, :, 0]}


WAN = FamilyCase(
    goldens=GOLDENS / "wan_unipc",
    sizes={"height": 48, "width": 64, "num_frames": 9, "text_length": 9},
    grid=(3, 6, 8),
    model_class=WanTransformer3DModel,
    predict=predict,
    tables=tables,
    table_sizes=(
        ({"height": 48, "width": 64, "num_frames": 9}, (3, 6, 8)),
        ({"height": 16, "width": 32, "num_frames": 1}, (1, 2, 4)),
    ),
    video=None,
    padding="zeroed",
    golden_names=("stg_r",),
    cut_at=(2,),
    twins=(("stg-r", (2,)),),
    wide=("time_embedder", "time_proj", "scale_shift_table", "norm_q", "norm2"),
    narrow=frozenset({"to_q", "to_k", "to_v", "patch_embedding", "proj_out"}),
    refused_sizes=(
        ({"height": 40}, "height: expected a positive multiple of 16, got 40: use 32"),
        ({"width": 0}, "width: expected a positive multiple of 16, got 0: use 16"),
        (
            {"width": 528},
            "width: expected at most 512, the end of the position tables, got 528: use 512",
        ),
        ({"num_frames": 8}, "num_frames: expected 4k+1, got 8: use 9"),
        ({"num_frames": 0}, "num_frames: expected 4k+1, got 0: use 1"),
        ({"text_length": 0}, "text_length: expected a positive number of tokens, got 0: use 512"),
    ),
    refused=(
        (
            {"in_channels": 36},
            {},
            "in_channels 4 in transformer/config.json, as out_channels, or 12 for image-to-video, got 36",
        ),
        (
            {"image_dim": 1280},
            {},
            "expected image_dim in transformer/config.json of image-to-video, and only there, got 1280",
        ),
        ({"patch_size": [2, 2, 2]}, {}, "expected patch_size in transformer/config.json as 1, rows, columns"),
        ({"patch_size": 2}, {}, "expected patch_size in transformer/config.json as 1, rows, columns, got 2"),
        ({"ffn_dim": 0}, {}, "expected ffn_dim in transformer/config.json as a positive integer, got 0"),
        ({}, {"is_residual": True}, "expected the VAE of Wan 2.1, got one with is_residual or patch_size"),
        ({}, {"z_dim": 48}, "expected z_dim 4 in vae/config.json, as the transformer's out_channels, got 48"),
        ({}, {"scale_factor_spatial": "8"}, "expected scale_factor_spatial in vae/config.json as a positive"),
    ),
    refused_indexes=(
        (
            {"expand_timesteps": True, "boundary_ratio": 0.9},
            "expected expand_timesteps in model_index.json for Wan 2.2 TI2V alone, got it beside",
        ),
        ({"boundary_ratio": 0.875}, "or neither, got no transformer_2 and boundary_ratio 0.875: download"),
        ({"boundary_ratio": "0.9"}, "expected boundary_ratio in model_index.json from 0 to 1, got '0.9'"),
        (
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
            "or neither, got a transformer_2 and boundary_ratio None: download it again",
        ),
    ),
    published=(
        Published(
            "wan2.1-t2v-1.3b",
            Workload(480, 832, 81, 512),
            (16, 21, 60, 104),
            (16, 21, 60, 104),
            teraflops=283.0,
        ),
        Published(
            "wan2.1-t2v-14b",
            Workload(480, 832, 81, 512),
            (16, 21, 60, 104),
            (16, 21, 60, 104),
            teraflops=1678.0,
        ),
        *(
            Published(name, Workload(480, 832, 81, 512), (16, 21, 60, 104), (16, 21, 60, 104), teraflops)
            for name, teraflops in (
                ("wan2.1-i2v-14b", 1686.0),
                ("wan2.1-flf2v-14b", 1694.0),
                ("wan2.2-t2v-a14b", 1678.0),
                ("wan2.2-i2v-a14b", 1678.0),
            )
        ),
        Published(
            "wan2.2-ti2v-5b",
            Workload(704, 1280, 121, 512),
            (48, 31, 44, 80),
            (48, 31, 44, 80),
            teraflops=517.0,
        ),
    ),
    pipeline_class=WanPipeline,
    save_pipeline=save_pipeline,
    schedulers=(
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=5.0),
    ),
    vae_tiles=SMALL_TILES,
)
