"""CogVideoX: 2B adds positions to its tokens, with DDIM; 5B has RoPE, with DPM; 1.5 has patches in time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload
from tests.support.family_cases.case import (
    GOLDENS,
    TIMESTEP,
    FamilyCase,
    Grid,
    Published,
    Refused,
    Sizes,
    SomeSizes,
)
from tests.support.family_cases.tiny_text import TEXT_WIDTH, make_text_encoder, make_tokenizer

SCHEDULE = {
    "beta_end": 0.012,
    "beta_start": 0.00085,
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
DDIM = CogVideoXDDIMScheduler(**SCHEDULE, snr_shift_scale=3.0)
DPM = CogVideoXDPMScheduler(**SCHEDULE, snr_shift_scale=1.0)
SIZES: Sizes = {"height": 48, "width": 64, "num_frames": 9, "text_length": 9}


def save_pipeline(folder: Path, scheduler: Any, **options: Any) -> None:
    """CogVideoX: 4 pixels in time and 8 in space per latent; another trained size than that of SIZES.

    The VAE's tiles are half of its own sample size: 48 x 40.
    """
    torch.manual_seed(0)
    vae = tiny_vae(sample_height=96, sample_width=80)
    transformer = tiny_transformer(in_channels=4, text_embed_dim=TEXT_WIDTH, **options)
    CogVideoXPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=make_text_encoder(T5Config, T5EncoderModel),
        tokenizer=make_tokenizer(),
        transformer=transformer,
    ).save_pretrained(folder)


def tiny_vae(**options: Any) -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
        **options,
    )


def tiny_transformer(**options: Any) -> CogVideoXTransformer3DModel:
    """Another trained size than that of SIZES."""
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        out_channels=4,
        time_embed_dim=16,
        num_layers=3,
        sample_height=10,
        sample_width=12,
        sample_frames=17,
        max_text_seq_length=9,
        **options,
    )


def predict(model: Any, x: Tensor, condition: TextCondition) -> Tensor:
    _, frames, _, height, width = x.shape
    output: Tensor = model(
        hidden_states=x,
        encoder_hidden_states=condition.embeds,
        timestep=torch.full((len(x),), TIMESTEP),
        image_rotary_emb=rope(model, (frames, height, width)),
        return_dict=False,
    )[0]
    return output


def rope(model: Any, grid: Grid) -> tuple[Tensor, Tensor] | None:
    """The tables that the pipeline passes for a grid of latents; None for 2B."""
    if not model.config.use_rotary_positional_embeddings:
        return None
    pipeline = SimpleNamespace(transformer=model, vae_scale_factor_spatial=8)
    frames, height, width = grid
    cos, sin = CogVideoXPipeline._prepare_rotary_positional_embeddings(
        pipeline, 8 * height, 8 * width, frames, torch.device("cpu")
    )
    return cos, sin


def tables(model: Any, grid: Grid, frame_rate: float) -> dict[str, Tensor]:
    found = rope(model, grid)
    if found is not None:
        return dict(zip(("rope_cos", "rope_sin"), found, strict=True))
    frames, height, width = grid
    embedding = model.patch_embed
    both = embedding._get_positional_embeddings(height, width, 4 * (frames - 1) + 1)
    return {"positions": both[0, embedding.max_text_seq_length :].float()}


REFUSED_CONFIGS: tuple[Refused, ...] = (
    (
        {"in_channels": 12},
        {},
        "expected in_channels 4 in transformer/config.json, as out_channels, or 8 for image-to-video, got 12",
    ),
    ({"num_layers": 0}, {}, "expected num_layers in transformer/config.json as a positive integer, got 0"),
    (
        {"patch_size": "2"},
        {},
        "expected patch_size in transformer/config.json as a positive integer, got '2'",
    ),
    ({}, {"temporal_compression_ratio": None}, "expected temporal_compression_ratio in vae/config.json as a"),
)
REFUSED_SIZES: tuple[tuple[SomeSizes, str], ...] = (
    ({"height": 40}, "height: expected a positive multiple of 16, got 40: use 32"),
    ({"width": 0}, "width: expected a positive multiple of 16, got 0: use 16"),
    ({"num_frames": 8}, "num_frames: expected 4k+1, got 8: use 9"),
    ({"text_length": 0}, "text_length: expected a positive number of tokens, got 0: use 226"),
    ({"text_length": 8}, "text_length: expected 9, of which the model reads every token, got 8: use 9"),
)


def case(name: str, scheduler: Any, published: tuple[Published, ...], **options: Any) -> FamilyCase:
    """The common part of the three; `options` are the transformer's."""
    in_time = options.get("patch_size_t", 1)
    small: SomeSizes = {"height": 16, "width": 32, "num_frames": 1}
    past_tables: tuple[SomeSizes, str] = (
        {"width": 176},
        "width: expected at most 160, the end of the position tables, got 176: use 160",
    )
    return FamilyCase(
        goldens=GOLDENS / name,
        sizes=SIZES,
        grid=(4 if in_time == 2 else 3, 6, 8),
        model_class=CogVideoXTransformer3DModel,
        predict=predict,
        tables=tables,
        table_sizes=(
            ({"height": 48, "width": 64, "num_frames": 9}, (4 if in_time == 2 else 3, 6, 8)),
            (small, (in_time, 2, 4)),
        ),
        video=slice(SIZES["text_length"], None),
        padding="kept",
        rounding=2e-6,
        golden_names=("cfg",) if in_time == 2 else ("stg_r",),
        cut_at=(2,),
        twins=(("stg-r", (2,)),),
        wide=("time_embedding", "norm_out", "norm_final", "norm1.norm", "norm_q"),
        narrow=frozenset({"to_q", "to_k", "to_v", "linear", "proj_out", "patch_embedding"}),
        refused_sizes=(*REFUSED_SIZES, *((past_tables,) if in_time == 2 else ())),
        refused=REFUSED_CONFIGS,
        refused_indexes=(),
        published=published,
        pipeline_class=CogVideoXPipeline,
        save_pipeline=partial(save_pipeline, scheduler=scheduler, **options),
        schedulers=(scheduler,),
    )


SHORT = Workload(480, 720, 49, 226)
COGVIDEOX = {
    "2b": case(
        "cogvideox_2b",
        DDIM,
        (Published("cogvideox-2b", SHORT, (16, 13, 60, 90), (13, 16, 60, 90), teraflops=120.0),),
    ),
    "5b": case(
        "cogvideox_5b",
        DPM,
        (
            Published("cogvideox-5b", SHORT, (16, 13, 60, 90), (13, 16, 60, 90), teraflops=332.0),
            Published("cogvideox-5b-i2v", SHORT, (16, 13, 60, 90), (13, 16, 60, 90), teraflops=332.0),
        ),
        use_rotary_positional_embeddings=True,
    ),
    "1.5": case(
        "cogvideox_1_5",
        DDIM,
        tuple(
            Published(
                name, Workload(768, 1360, 81, 226), (16, 22, 96, 170), (22, 16, 96, 170), teraflops=1480.0
            )
            for name in ("cogvideox-1.5-5b", "cogvideox-1.5-5b-i2v")
        ),
        use_rotary_positional_embeddings=True,
        patch_size_t=2,
        patch_bias=False,
    ),
}
