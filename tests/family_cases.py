"""What the tests know of each family: a tiny checkpoint, its uncut model, and facts to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor

from stg_trt.checkpoint import Checkpoint
from stg_trt.families.base import ModelFamily, TextCondition, Workload
from tests.tiny_pipelines import save_ltx, save_wan

GOLDENS = Path(__file__).parent / "goldens"
TIMESTEP = 731.0
Sizes = dict[str, int]
Uncut = Callable[[Any, Tensor, TextCondition], Tensor]
Tables = Callable[[Any, tuple[int, int, int], float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Published:
    """A published configuration at one size, and the TFLOP of a forward of one row there."""

    name: str
    workload: Workload
    latents: tuple[int, ...]
    packed: tuple[int, ...]
    teraflops: float

    def __str__(self) -> str:
        return f"{self.name}-{self.workload}"


@dataclass(frozen=True)
class FamilyCase:
    """One family. `goldens` holds the tiny transformer; it has five blocks.

    `uncut` is one pass of diffusers' model at TIMESTEP with what its pipeline passes. `tables` are its
    position tables for a grid of latents and a frame rate. `cut_at` and `twins`, (mode, blocks), are what the
    goldens perturb. `wide` words are in the names of weights that stay float32, `narrow` ones are modules of
    others. `refused` are changes to the configurations of transformer and VAE, and what is said of them.
    """

    goldens: Path
    sizes: Sizes
    grid: tuple[int, int, int]
    model_class: Any
    uncut: Uncut
    tables: Tables
    table_sizes: tuple[tuple[Sizes, tuple[int, int, int]], ...]
    golden_names: tuple[str, ...]
    cut_at: tuple[int, ...]
    twins: tuple[tuple[str, tuple[int, ...]], ...]
    wide: tuple[str, ...]
    narrow: frozenset[str]
    refused_sizes: tuple[tuple[Sizes, str], ...]
    refused: tuple[tuple[dict[str, Any], dict[str, Any], str], ...]
    refused_indexes: tuple[tuple[dict[str, Any], str], ...]
    published: tuple[Published, ...]
    pipeline_class: Any
    save_pipeline: Callable[[Path], None]
    schedulers: tuple[Any, ...]

    @property
    def workload(self) -> Workload:
        """The sizes of the goldens."""
        return Workload(**self.sizes)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The tiny transformer."""
        return Checkpoint.open(self.goldens)

    @cached_property
    def family(self) -> ModelFamily:
        """Of the tiny transformer."""
        return self.checkpoint.family

    def latents(self, rows: int) -> Tensor:
        """Standard normal, in the layout that the transformer takes."""
        shape = self.family.tensors(self.workload)["latents"].with_rows(rows)
        return torch.randn(shape, generator=torch.Generator().manual_seed(7))

    def text(self, rows: int, seed: int = 0) -> TextCondition:
        """Embeddings of which each row has another number of real tokens."""
        generator = torch.Generator().manual_seed(seed)
        shape = self.family.tensors(self.workload)["prompt_embeds"].with_rows(rows)
        mask = (torch.arange(shape[1]) < torch.arange(3, 3 + rows)[:, None]).float()
        return TextCondition(torch.randn(shape, generator=generator), mask)

    def __str__(self) -> str:
        return self.goldens.name


def _uncut_ltx(model: Any, x: Tensor, condition: TextCondition) -> Tensor:
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


def _uncut_wan(model: Any, x: Tensor, condition: TextCondition) -> Tensor:
    output: Tensor = model(
        hidden_states=x,
        timestep=torch.full((len(x),), TIMESTEP),
        encoder_hidden_states=condition.embeds * condition.mask[:, :, None],
        return_dict=False,
    )[0]
    return output


def _ltx_tables(model: Any, grid: tuple[int, int, int], frame_rate: float) -> tuple[Tensor, Tensor]:
    cos, sin = model.rope(torch.zeros(1, 1), *grid, (8 / frame_rate, 32, 32))
    return cos[0], sin[0]


def _wan_tables(model: Any, grid: tuple[int, int, int], frame_rate: float) -> tuple[Tensor, Tensor]:
    cos, sin = model.rope(torch.zeros(1, 4, *grid))
    return cos[0, :, 0], sin[0, :, 0]


LTX = FamilyCase(
    goldens=GOLDENS / "ltx",
    sizes={"height": 128, "width": 160, "num_frames": 17, "text_length": 9},
    grid=(3, 4, 5),
    model_class=LTXVideoTransformer3DModel,
    uncut=_uncut_ltx,
    tables=_ltx_tables,
    table_sizes=(
        ({"height": 128, "width": 160, "num_frames": 17}, (3, 4, 5)),
        ({"height": 32, "width": 64, "num_frames": 1}, (1, 1, 2)),
    ),
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
    save_pipeline=save_ltx,
    schedulers=(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),),
)

WAN = FamilyCase(
    goldens=GOLDENS / "wan_unipc",
    sizes={"height": 48, "width": 64, "num_frames": 9, "text_length": 9},
    grid=(3, 6, 8),
    model_class=WanTransformer3DModel,
    uncut=_uncut_wan,
    tables=_wan_tables,
    table_sizes=(
        ({"height": 48, "width": 64, "num_frames": 9}, (3, 6, 8)),
        ({"height": 16, "width": 32, "num_frames": 1}, (1, 2, 4)),
    ),
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
            "in_channels 4 in transformer/config.json, as out_channels, got 36: image-",
        ),
        (
            {"image_dim": 1280},
            {},
            "expected no image_dim in transformer/config.json, got 1280: image-to-",
        ),
        ({"added_kv_proj_dim": 24}, {}, "expected no added_kv_proj_dim in transformer/config.json, got 24"),
        ({"pos_embed_seq_len": 514}, {}, "expected no pos_embed_seq_len in transformer/config.json, got 514"),
        ({"patch_size": [2, 2, 2]}, {}, "expected patch_size in transformer/config.json as 1, rows, columns"),
        ({"patch_size": 2}, {}, "expected patch_size in transformer/config.json as 1, rows, columns, got 2"),
        ({"ffn_dim": 0}, {}, "expected ffn_dim in transformer/config.json as a positive integer, got 0"),
        ({}, {"is_residual": True}, "expected the VAE of Wan 2.1, got one with is_residual or patch_size"),
        ({}, {"z_dim": 48}, "expected z_dim 4 in vae/config.json, as the transformer's in_channels, got 48"),
        ({}, {"scale_factor_spatial": "8"}, "expected scale_factor_spatial in vae/config.json as a positive"),
    ),
    refused_indexes=(
        ({"expand_timesteps": True}, "Wan 2.1, which has no expand_timesteps, got expand_timesteps True in"),
        ({"boundary_ratio": 0.875}, "Wan 2.1, which has no boundary_ratio, got boundary_ratio 0.875 in"),
        (
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
            "which has no transformer_2, got",
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
    ),
    pipeline_class=WanPipeline,
    save_pipeline=save_wan,
    schedulers=(
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=5.0),
    ),
)

CASES = (LTX, WAN)
