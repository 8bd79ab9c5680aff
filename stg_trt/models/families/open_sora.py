"""Open-Sora 1.2, text-to-video: a factorised DiT, whose blocks attend inside a frame or along time.

Reproduces upstream's STDiT3 and its rectified flow, whose velocity has the other sign and which diffusers'
FlowMatchEulerDiscreteScheduler solves. Blocks are counted as they run: 2i is spatial_blocks[i], 2i+1
temporal_blocks[i]. These cross a cut: the hidden states, the modulation of the blocks, and the embedded
timestep `temb` that the head reads. Constant over the steps: the projected text and the mask of its padding,
the positions of a frame's tokens, the RoPE tables of time, and the frame rate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stg_trt.errors import InvalidRequest
from stg_trt.models.defaults import Defaults
from stg_trt.models.families import class_name_of
from stg_trt.models.families.cross_attention import CrossAttentionDiT
from stg_trt.models.families.dit import DiTSegment, State, TextProjection, unpatched
from stg_trt.models.families.keep_flags import KEEP_ATTENTION
from stg_trt.models.families.open_sora_network import (
    TIMESTEP_CHANNELS,
    Block,
    Rope,
    SelfAttention,
    STDiT3,
    position_table,
    rope_tables,
)
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.image import Places
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload

_POSITIONS = "positions"
_FPS = "fps"
_ROPE = ("rope_cos", "rope_sin")
# The VAE makes 5 latent frames of 17; a picture is one, and is told to be shown this often in a second.
_FRAMES, _LATENT_FRAMES = 17, 5
_PICTURE_FPS = 120.0
_SPATIAL_COMPRESSION = 8
# The side of the square at which the shift of the timesteps is 1 for one frame.
_UNSHIFTED_SIDE = 512
# Upstream's default, which its captions were trained with.
_SCORE = " aesthetic score: 6.5."
_PUBLISHED_PATCH = [1, 2, 2]
# Entries that only the configuration of another version has, whose class has the same name.
_OF_OTHER_VERSIONS = ("kernel_size", "use_spatial_rope", "x_embedder_cond")
_VAE_CLASS = "VideoAutoencoderPipeline"
_MASKED = -10000.0


class OpenSoraSegment(DiTSegment):
    """Residuals and modulation in float32, the rest in the compute dtype."""

    flattens_grid = False

    def take_embedding(self, transformer: STDiT3) -> None:
        self.x_embedder = transformer.x_embedder
        self.t_embedder, self.fps_embedder = transformer.t_embedder, transformer.fps_embedder
        self.t_block = transformer.t_block

    def take_head(self, transformer: STDiT3) -> None:
        self.final_layer = transformer.final_layer

    def embed(self, state: State) -> State:
        temb = self.t_embedder(state["timestep"]) + self.fps_embedder(state[_FPS])
        return {
            "hidden_states": self.x_embedder(state["latents"], state[_POSITIONS]),
            "modulation": self.t_block(temb).unflatten(1, (6, -1)),
            "temb": temb,
        }

    def block(self, block: Block, state: State, perturbed: bool) -> State:
        def mix(attn: SelfAttention, x: Tensor, rope: Rope | None) -> Tensor:
            """proj(V) for rows whose attention is skipped (stg-a)."""
            if perturbed:
                out: Tensor = attn.proj(attn.value(x))
                return out
            return self.mixed(attn, x, rope, state.get(KEEP_ATTENTION))

        rope = (state["rope_cos"], state["rope_sin"]) if block.temporal and not perturbed else None
        hidden, text = state["hidden_states"], state["text"]
        after = block(hidden, text, state["text_bias"], state["modulation"], rope, mix, self.attend)
        return {"hidden_states": after}

    def mixed(self, attn: SelfAttention, x: Tensor, rope: Rope | None, keep: Tensor | None) -> Tensor:
        """Attention inside each sequence of (rows, sequences, tokens, channels)."""
        query, key, value = attn.qkv_heads(x.flatten(0, 1), rope)
        attended = self.attend(query, key, value).unflatten(0, (-1, x.shape[1]))
        if keep is not None:
            own = value.unflatten(0, (-1, x.shape[1]))
            attended = torch.where(keep[:, None, None, None, None], attended, own)
        out: Tensor = attn.proj(attended.transpose(2, 3).flatten(3))
        return out

    def head(self, state: State) -> Tensor:
        pred: Tensor = self.final_layer(state["hidden_states"], state["temb"])
        return pred

    def unpatch(self, pred: Tensor, grid: tuple[int, ...]) -> Tensor:
        return unpatched(pred.flatten(1, 3), grid, self.patch)


class OpenSora(CrossAttentionDiT):
    """Open-Sora 1.2 as its authors publish it (hpcai-tech/OpenSora-STDiT-v3)."""

    name = "open-sora"
    transformer_class = "STDiT3"
    export_version = 1
    pipeline_class = "OpenSoraPipeline"
    plugins = frozenset()
    takes_lora = False
    null_text = "y_embedder.y_embedding"
    block_counts = ("depth",)
    modulation = "modulation"
    head_modulation = "temb"
    front_constants = (_POSITIONS, _FPS)
    block_constants = ("text", "text_bias", *_ROPE)
    float32_islands = r"t_embedder\.|fps_embedder\.|t_block\.|scale_shift_table|norm"
    segment_class = OpenSoraSegment
    defaults = Defaults(
        # The paper's twelfth of 28 pairs: both attentions of spatial_blocks[11] and temporal_blocks[11].
        stg_mode="stg-a",
        stg_blocks=(22, 23),
        stg_scale=2.0,
        guidance_scale=7.0,
        rescale=0.0,
        num_inference_steps=30,
        frame_rate=24.0,
        text_length=300,
    )

    @property
    def num_blocks(self) -> int:
        return 2 * self.integer("depth")

    @property
    def width(self) -> int:
        return self.integer("hidden_size")

    @property
    def head_channels(self) -> int:
        """Channels of a head."""
        return self.width // self.integer("num_heads")

    @property
    def feed_forward_width(self) -> int:
        return int(self.width * self.config["mlp_ratio"])

    @property
    def text_channels(self) -> int:
        return self.integer("caption_channels")

    @property
    def timestep_channels(self) -> int:
        return TIMESTEP_CHANNELS

    @property
    def compression(self) -> tuple[int, int]:
        """In time it is that of the latents of 17 frames, and no whole number."""
        raise TypeError("Open-Sora's VAE does not compress time by a whole number")

    @property
    def patch(self) -> tuple[int, int, int]:
        _, rows, columns = _PUBLISHED_PATCH
        return 1, rows, columns

    def block_of(self, weight_name: str) -> int | None:
        match = re.match(r"(spatial|temporal)_blocks\.(\d+)\.", weight_name)
        return 2 * int(match[2]) + (match[1] == "temporal") if match else None

    def blocks(self, transformer: STDiT3) -> Sequence[nn.Module]:
        return transformer.running_order

    def network_class(self) -> type[STDiT3]:
        return STDiT3

    def pipeline_type(self) -> Any:
        from stg_trt.models.families.open_sora_pipeline import OpenSoraPipeline

        return OpenSoraPipeline

    def own_vae_class(self) -> Any:
        from stg_trt.models.families.open_sora_vae import OpenSoraVAE

        return OpenSoraVAE

    def check(self, workload: Workload) -> None:
        self._check_version()
        multiples = [_SPATIAL_COMPRESSION * patch for patch in self.patch[1:]]
        for side, multiple in zip(("height", "width"), multiples, strict=True):
            pixels = getattr(workload, side)
            if pixels <= 0 or pixels % multiple:
                raise InvalidRequest(
                    f"{side}: expected a positive multiple of {multiple}, got {pixels}: "
                    f"use {max(multiple, round(pixels / multiple) * multiple)}"
                )
        frames = workload.num_frames
        if frames != 1 and (frames <= 0 or frames % _FRAMES):
            nearest = max(1, round(frames / _FRAMES)) * _FRAMES
            raise InvalidRequest(
                f"num_frames: expected 1 or a multiple of {_FRAMES}, which the VAE decodes at a time, got "
                f"{frames}: use {nearest}"
            )
        most = self.integer("model_max_length")
        if not 0 < workload.text_length <= most:
            raise InvalidRequest(
                f"text_length: expected 1 to {most} tokens, as many as the model has embeddings of no text, "
                f"got {workload.text_length}: use {most}"
            )

    def _check_version(self) -> None:
        """Refuses other versions of the model, whose class has the same name."""
        found = [name for name in _OF_OTHER_VERSIONS if name in self.config]
        known = self.config["patch_size"] == _PUBLISHED_PATCH and self.config["qk_norm"] is True
        if found or not known or self.config["pred_sigma"] is not True:
            got = found[0] if found else "another patch_size, qk_norm or pred_sigma"
            raise InvalidRequest(
                "checkpoint: expected STDiT3 of Open-Sora 1.2 (hpcai-tech/OpenSora-STDiT-v3), got "
                f"{got} in transformer/config.json, as other versions have: use 1.2"
            )
        vae = class_name_of(self.vae_config or {"_class_name": _VAE_CLASS})
        if vae != _VAE_CLASS:
            raise InvalidRequest(
                f"checkpoint: expected {_VAE_CLASS} in vae/config.json, the VAE of Open-Sora 1.2, got {vae}: "
                "the folder mixes two versions; use hpcai-tech/OpenSora-VAE-v1.2"
            )

    def latent_shape(self, workload: Workload) -> tuple[int, int, int, int]:
        frames = workload.num_frames // _FRAMES * _LATENT_FRAMES or 1
        sides = workload.height // _SPATIAL_COMPRESSION, workload.width // _SPATIAL_COMPRESSION
        return self.latent_channels, frames, *sides

    def own_tensors(self, workload: Workload) -> tuple[TensorSpec, ...]:
        latents, (frames, height, width) = self.latent_shape(workload), self.grid(workload)
        table = (frames, self.head_channels // 2)
        return (
            TensorSpec("latents", workload.dtype, (ROWS, *latents)),
            TensorSpec("hidden_states", workload.dtype, (ROWS, frames, height, width, self.width)),
            TensorSpec("modulation", "float32", (ROWS, 6, self.width)),
            TensorSpec("temb", "float32", (ROWS, self.width)),
            TensorSpec("text_bias", workload.dtype, (ROWS, 1, 1, workload.text_length)),
            TensorSpec(_POSITIONS, "float32", (height * width, self.width)),
            TensorSpec(_FPS, "float32", (1,)),
            *(TensorSpec(name, "float32", table) for name in _ROPE),
            TensorSpec("pred", workload.dtype, (ROWS, *latents)),
        )

    def borders(self, segment: Segment) -> tuple[tuple[str, ...], tuple[str, ...]]:
        inputs, outputs = super().borders(segment)
        if not any(block % 2 for block in _attending(segment)):
            inputs = tuple(name for name in inputs if name not in _ROPE)
        return inputs, outputs

    def text_module(self, transformer: STDiT3, *borders: Any) -> SegmentModule:
        return TextProjection(transformer.y_embedder.y_proj, *borders)

    def segment_flops(self, segment: Segment, workload: Workload) -> int:
        width, (frames, *sides) = self.width, self.grid(workload)
        tokens, places, text = self.tokens(workload), math.prod(sides), workload.text_length
        if segment.text:
            return 2 * text * width * (self.text_channels + width)
        cross = 2 * tokens * 2 * width**2 + 2 * text * 2 * width**2 + 4 * tokens * text * width
        others = cross + 2 * tokens * 2 * width * self.feed_forward_width
        total, attending = 0, _attending(segment)
        for block in segment.blocks:
            if block in attending:
                seen = frames if block % 2 else places
                total += others + 2 * tokens * 4 * width**2 + 4 * tokens * seen * width
            elif segment.skipped is not None and segment.skipped.mode == "stg-a":
                total += others + 2 * tokens * 2 * width**2
        patches = 2 * tokens * width * math.prod(self.patch) * self.latent_channels
        if segment.front:
            total += patches + 2 * width * (self.timestep_channels + 7 * width)
        return total + (patches if segment.back else 0)

    def position_tables(
        self, workload: Workload, frame_rate: float, placed: Places = ()
    ) -> dict[str, Tensor]:
        frames, height, width = self.grid(workload)
        pixels, trained = (workload.height, workload.width), self.integer("input_sq_size")
        cos, sin = rope_tables(frames, self.head_channels)
        rate = frame_rate if workload.num_frames > 1 else _PICTURE_FPS
        return {
            "rope_cos": cos,
            "rope_sin": sin,
            _POSITIONS: position_table((height, width), pixels, trained, self.width),
            _FPS: torch.tensor([rate]),
        }

    def text_inputs(self, text: TextCondition, workload: Workload) -> dict[str, Tensor]:
        bias = (1 - text.mask.float()) * _MASKED
        return {"prompt_embeds": text.embeds, "text_bias": bias[:, None, None, :]}

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, workload: Workload) -> None:
        import numpy as np

        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas, **self.shift(scheduler, workload))

    def shift(self, scheduler: Any, workload: Workload) -> dict[str, float]:
        """Larger frames and longer videos take more of their steps where there is more noise."""
        frames = workload.num_frames // _FRAMES * _LATENT_FRAMES or 1
        return {"mu": math.sqrt(workload.height * workload.width * frames) / _UNSHIFTED_SIDE}

    def text_tokens(self, pipeline: Any, prompt: str) -> int:
        return len(pipeline.tokenizer(pipeline.cleaned(prompt) + _SCORE).input_ids)

    def encode_prompt(self, pipeline: Any, prompts: list[str], workload: Workload) -> TextCondition:
        texts = [pipeline.cleaned(prompt) + _SCORE for prompt in prompts]
        return TextCondition(*pipeline.encode_prompt(texts, workload.text_length))

    def vae_latents(self, pipeline: Any, latents: Tensor, workload: Workload) -> Tensor:
        scaled: Tensor = pipeline.vae.scaled(latents.to(pipeline.vae.dtype))
        return scaled

    def decode(self, pipeline: Any, latents: Tensor, workload: Workload, **options: Any) -> Iterator[Tensor]:
        vae = pipeline.vae
        for one in latents.split(1):
            yield vae.decode(one.to(vae.dtype), workload.num_frames)


def _attending(segment: Segment) -> tuple[int, ...]:
    """The blocks that have their self-attention."""
    skipped = segment.skipped.blocks if segment.skipped else ()
    return tuple(block for block in segment.blocks if block not in skipped)
