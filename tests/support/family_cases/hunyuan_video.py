"""HunyuanVideo."""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor
from transformers import (
    AddedToken,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizerFast,
)

from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload
from tests.support.family_cases.case import GOLDENS, SMALL_TILES, TIMESTEP, FamilyCase, Grid, Published
from tests.support.family_cases.tiny_text import TEXT_WIDTH, WORDS

POOLED_WIDTH = 12
# This family's pipeline tokenises a prompt as it is written.
PIECES = (*WORDS, "&amp;amp;")


def make_tokenizer(before: Sequence[str], after: Sequence[str]) -> LlamaTokenizerFast:
    """Whole words, and tokens of a template before and after them."""
    merges = [(word[:end], word[end]) for word in PIECES for end in range(1, len(word))]
    merges += [("\u2581", word) for word in PIECES]
    pieces = ["<unk>", "<s>", "</s>", "<pad>", "\u2581", *"".join(PIECES), *map("".join, merges)]
    tokenizer = LlamaTokenizerFast(
        vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))},
        merges=list(dict.fromkeys(merges)),
        pad_token="<pad>",
        padding_side="right",
    )
    first, *rest = after
    template = [AddedToken(piece, normalized=False) for piece in (*before, *rest)]
    tokenizer.add_tokens([*template, AddedToken(first, lstrip=True, normalized=False)])
    return tokenizer


def text_tokenizer() -> LlamaTokenizerFast:
    """A template of as many tokens as the pipeline cuts off before a prompt."""
    before, after = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")
    size = len(before) // DEFAULT_PROMPT_TEMPLATE["crop_start"]
    bounds = [*range(0, size * DEFAULT_PROMPT_TEMPLATE["crop_start"], size), len(before)]
    return make_tokenizer([before[start:stop] for start, stop in pairwise(bounds)], [after])


def make_text_encoder(vocabulary: int) -> LlamaModel:
    """Three layers, since the pipeline reads the third hidden state from the end."""
    return LlamaModel(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            pad_token_id=3,
        )
    )


def make_clip_tokenizer() -> CLIPTokenizer:
    """Letters, of which the last of a word is marked."""
    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def make_clip(vocabulary: int) -> CLIPTextModel:
    """One layer; the pooled prompt is what comes out at the end of the text."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=POOLED_WIDTH,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def tiny_vae() -> AutoencoderKLHunyuanVideo:
    """4 latent channels."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def tiny_transformer(**options: Any) -> HunyuanVideoTransformer3DModel:
    """Two double blocks and a single one."""
    return HunyuanVideoTransformer3DModel(
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        rope_axes_dim=(4, 6, 6),
        **options,
    )


def save_pipeline(folder: Path) -> None:
    """HunyuanVideo: 4 pixels in time and 8 in space per latent."""
    torch.manual_seed(0)
    vae, transformer = tiny_vae(), tiny_transformer(in_channels=4)
    tokenizer, tokenizer_2 = text_tokenizer(), make_clip_tokenizer()
    HunyuanVideoPipeline(
        text_encoder=make_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=make_clip(len(tokenizer_2)),
        tokenizer_2=tokenizer_2,
    ).save_pretrained(folder)


def predict(model: Any, x: Tensor, condition: TextCondition) -> Tensor:
    output: Tensor = model(
        hidden_states=x,
        timestep=torch.full((len(x),), TIMESTEP),
        encoder_hidden_states=condition.embeds,
        encoder_attention_mask=condition.mask,
        pooled_projections=condition.pooled,
        guidance=torch.full((len(x),), 6.0) * 1000.0,
        return_dict=False,
    )[0]
    return output


def tables(model: Any, grid: Grid, frame_rate: float) -> dict[str, Tensor]:
    cos, sin = model.rope(torch.zeros(1, 4, *grid))
    return {"rope_cos": cos, "rope_sin": sin}


HUNYUAN_VIDEO = FamilyCase(
    goldens=GOLDENS / "hunyuan_video",
    sizes={"height": 48, "width": 64, "num_frames": 9, "text_length": 9},
    grid=(3, 6, 8),
    model_class=HunyuanVideoTransformer3DModel,
    predict=predict,
    tables=tables,
    table_sizes=(
        ({"height": 48, "width": 64, "num_frames": 9}, (3, 6, 8)),
        ({"height": 16, "width": 32, "num_frames": 1}, (1, 2, 4)),
    ),
    video=slice(0, 36),
    padding="masked",
    mask_name="key_bias",
    golden_names=("stg_r",),
    cut_at=(2, 3),
    twins=(("stg-r", (2,)),),
    wide=("time_text_embed", "norm_q", "norm_added_k", "refiner_blocks.0.norm1"),
    narrow=frozenset({"to_q", "add_q_proj", "proj_in", "proj_mlp", "proj_out", "linear"}),
    refused_sizes=(
        ({"height": 40}, "height: expected a positive multiple of 16, got 40: use 32"),
        ({"width": 0}, "width: expected a positive multiple of 16, got 0: use 16"),
        ({"num_frames": 8}, "num_frames: expected 4k+1, got 8: use 9"),
        ({"num_frames": 0}, "num_frames: expected 4k+1, got 0: use 1"),
        ({"text_length": 0}, "text_length: expected a positive number of tokens, got 0: use 256"),
    ),
    refused=(
        (
            {"image_condition_type": "first_frame"},
            {},
            "image_condition_type token_replace or latent_concat, got 'first_frame' in transformer",
        ),
        (
            {"in_channels": 9},
            {},
            "as many latents in in_channels as in out_channels, got 9 and 4 in transfor",
        ),
        (
            {"patch_size_t": 2},
            {},
            "expected patch_size_t 1 in transformer/config.json, as in every published",
        ),
        (
            {"qk_norm": None},
            {},
            "expected qk_norm rms_norm in transformer/config.json, as in every published",
        ),
        (
            {"mlp_ratio": "4"},
            {},
            "expected mlp_ratio in transformer/config.json as a positive number, got '4'",
        ),
        (
            {"rope_axes_dim": [4, 6]},
            {},
            "three even sizes that sum to attention_head_dim, got [4, 6]: down",
        ),
        ({"rope_axes_dim": 16}, {}, "three even sizes that sum to attention_head_dim, got 16: download"),
        (
            {"num_single_layers": -1},
            {},
            "expected num_single_layers in transformer/config.json as a positive",
        ),
        (
            {"num_refiner_layers": 0},
            {},
            "expected num_refiner_layers in transformer/config.json as a positive",
        ),
        ({}, {"latent_channels": 16}, "expected latent_channels 4 in vae/config.json, as the transformer's"),
        (
            {},
            {"spatial_compression_ratio": "8"},
            "spatial_compression_ratio in vae/config.json as a positive",
        ),
    ),
    refused_indexes=(
        (
            {"image_processor": ["transformers", "CLIPImageProcessor"]},
            "without image_processor, got image_processor ['transformers', 'CLIPImageProcessor'] in",
        ),
    ),
    published=(
        Published(
            "hunyuan-video",
            Workload(544, 960, 65, 256),
            (16, 17, 68, 120),
            (16, 17, 68, 120),
            teraflops=1375.0,
        ),
        Published(
            "hunyuan-video-i2v",
            Workload(544, 960, 65, 400),
            (16, 17, 68, 120),
            (16, 17, 68, 120),
            teraflops=1384.0,
        ),
        Published(
            "hunyuan-video-i2v-33ch",
            Workload(544, 960, 65, 544),
            (16, 17, 68, 120),
            (16, 17, 68, 120),
            teraflops=1394.0,
        ),
    ),
    pipeline_class=HunyuanVideoPipeline,
    save_pipeline=save_pipeline,
    # The sine of a guidance of thousands: what is left of it depends on the processor (2.0e-6 on one).
    rounding=3e-6,
    schedulers=(FlowMatchEulerDiscreteScheduler(shift=7.0),),
    variants=({"guidance_embeds": False},),
    # In time too, with or without tiling.
    vae_tiles={**SMALL_TILES, "tile_sample_min_num_frames": 8, "tile_sample_stride_num_frames": 4},
)
