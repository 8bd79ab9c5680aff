"""LTX-Video 2B and 13B: a DiT with self-attention, cross-attention and feed-forward in every block.

Reproduces diffusers' LTXVideoTransformer3DModel and LTXPipeline. What crosses a cut: the hidden states, the
timestep modulation `temb`, and the embedded timestep that the head reads. Constant over the steps: the
projected text, its mask, and the RoPE tables.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stg_trt.errors import InvalidRequest
from stg_trt.families.base import (
    KEEP_ATTENTION,
    Defaults,
    ModelFamily,
    SegmentModule,
    TextCondition,
    Workload,
    keep_attention_spec,
    load_class,
)
from stg_trt.segment import Segment
from stg_trt.tensor_spec import ROWS, TensorSpec

_BLOCK_INPUTS = ("hidden_states", "temb", "text", "text_bias", "rope_cos", "rope_sin")


class LTXVideo(ModelFamily):
    """LTX-Video as diffusers has it (Lightricks, arXiv 2501.00103)."""

    name = "ltx-video"
    transformer_class = "LTXVideoTransformer3DModel"
    pipeline_class = "LTXPipeline"
    has_text_segment = True
    decode_options = frozenset({"decode_timestep", "decode_noise_scale"})
    defaults = Defaults("stg-a", (19,), 1.0, 3.0, 0.7, 40, 25.0)

    @property
    def num_blocks(self) -> int:
        return self.integer("num_layers")

    @property
    def width(self) -> int:
        """Channels of the hidden states."""
        return self.integer("num_attention_heads") * self.integer("attention_head_dim")

    @property
    def compression(self) -> tuple[int, int]:
        """Pixels per latent in time and in space, from the VAE's configuration or the published VAE's."""
        if self.vae_config is None:
            return 8, 32
        vae, halvings = self.vae_config, sum(self.vae_config["spatio_temporal_scaling"])
        temporal = vae.get("temporal_compression_ratio") or vae["patch_size_t"] * 2**halvings
        return temporal, vae.get("spatial_compression_ratio") or vae["patch_size"] * 2**halvings

    def block_of(self, weight_name: str) -> int | None:
        match = re.match(r"transformer_blocks\.(\d+)\.", weight_name)
        return int(match[1]) if match else None

    def check(self, workload: Workload) -> None:
        for name in ("patch_size", "patch_size_t"):
            if self.integer(name) != 1:
                raise InvalidRequest(
                    f"checkpoint: expected {name} 1 in transformer/config.json, as in every published "
                    f"LTX-Video, got {self.config[name]}: use a checkpoint without patches"
                )
        temporal, spatial = self.compression
        for side in ("height", "width"):
            pixels = getattr(workload, side)
            if pixels <= 0 or pixels % spatial:
                raise InvalidRequest(
                    f"{side}: expected a positive multiple of {spatial}, got {pixels}: "
                    f"use {max(spatial, round(pixels / spatial) * spatial)}"
                )
        if workload.num_frames <= 0 or (workload.num_frames - 1) % temporal:
            nearest = max(0, round((workload.num_frames - 1) / temporal)) * temporal + 1
            raise InvalidRequest(
                f"num_frames: expected {temporal}k+1, got {workload.num_frames}: use {nearest}"
            )
        if workload.text_length <= 0:
            raise InvalidRequest(
                f"text_length: expected a positive number of tokens, got {workload.text_length}: use 128"
            )

    def latent_shape(self, workload: Workload) -> tuple[int, int, int, int]:
        temporal, spatial = self.compression
        frames = (workload.num_frames - 1) // temporal + 1
        return self.integer("in_channels"), frames, workload.height // spatial, workload.width // spatial

    def tokens(self, workload: Workload) -> int:
        """Video tokens; the published models have a patch size of 1."""
        _, frames, height, width = self.latent_shape(workload)
        return frames * height * width

    def tensors(self, workload: Workload) -> dict[str, TensorSpec]:
        tokens, text, width, dtype = self.tokens(workload), workload.text_length, self.width, workload.dtype
        specs = (
            TensorSpec("latents", dtype, (ROWS, tokens, self.integer("in_channels"))),
            TensorSpec("timestep", "float32", (ROWS,)),
            TensorSpec("prompt_embeds", dtype, (ROWS, text, self.integer("caption_channels"))),
            TensorSpec("hidden_states", dtype, (ROWS, tokens, width)),
            TensorSpec("temb", "float32", (ROWS, 1, 6 * width)),
            TensorSpec("embedded_timestep", "float32", (ROWS, 1, width)),
            TensorSpec("text", dtype, (ROWS, text, width)),
            TensorSpec("text_bias", dtype, (ROWS, 1, 1, text)),
            TensorSpec("rope_cos", "float32", (tokens, width)),
            TensorSpec("rope_sin", "float32", (tokens, width)),
            TensorSpec("pred", dtype, (ROWS, tokens, self.integer("out_channels"))),
            keep_attention_spec(),
        )
        return {spec.name: spec for spec in specs}

    def borders(self, segment: Segment) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if segment.text:
            return ("prompt_embeds",), ("text",)
        values_only = segment.skipped is not None and segment.skipped.blocks == tuple(segment.blocks)
        block_inputs: tuple[str, ...] = _BLOCK_INPUTS if segment.blocks else ("hidden_states",)
        if values_only and segment.skipped is not None:
            unused = ("rope_cos", "rope_sin") if segment.skipped.mode == "stg-a" else _BLOCK_INPUTS[1:]
            block_inputs = tuple(name for name in block_inputs if name not in unused)
        inputs = ("latents", "timestep", *block_inputs[1:]) if segment.front else block_inputs
        if segment.front:
            # The front makes the modulation that its own blocks read.
            inputs = tuple(name for name in inputs if name != "temb")
        if segment.keep_input:
            inputs += (KEEP_ATTENTION,)
        if not segment.back:
            return inputs, ("hidden_states", "temb", "embedded_timestep")[: 3 if segment.front else 1]
        return inputs if segment.front else (*inputs, "embedded_timestep"), ("pred",)

    def module(self, transformer: nn.Module, segment: Segment, *, expand_masks: bool) -> SegmentModule:
        if segment.text:
            return _TextProjection(transformer, *self.borders(segment), expand_masks)
        return _LTXSegment(transformer, segment, *self.borders(segment), expand_masks)

    def lower_precision(self, module: SegmentModule, dtype: torch.dtype) -> None:
        for name, parameter in module.named_parameters():
            # Timestep MLP, modulation tables and norms stay float32 (they are applied in float32).
            if not re.search(r"time_embed\.|scale_shift_table|norm", name):
                parameter.data = parameter.data.to(dtype)

    def segment_flops(self, segment: Segment, workload: Workload) -> int:
        tokens, text, width = self.tokens(workload), workload.text_length, self.width
        if segment.text:
            return 2 * text * width * (self.integer("caption_channels") + width)
        cross = 2 * tokens * 2 * width**2 + 2 * text * 2 * width**2 + 4 * tokens * text * width
        feed_forward = 2 * tokens * 8 * width**2
        self_attention = 2 * tokens * 4 * width**2 + 4 * tokens**2 * width
        values_only = 2 * tokens * 2 * width**2
        total: int = 0
        for block in segment.blocks:
            skipped = segment.skipped is not None and block in segment.skipped.blocks
            if skipped and segment.skipped is not None and segment.skipped.mode == "stg-r":
                continue
            total += cross + feed_forward + (values_only if skipped else self_attention)
        if segment.front:
            total += 2 * tokens * width * self.integer("in_channels") + 2 * width * (256 + 7 * width)
        if segment.back:
            total += 2 * tokens * width * self.integer("out_channels")
        return int(total)

    def attentions(self, segment: Segment) -> int:
        skipped = segment.skipped.blocks if segment.skipped else ()
        per_skipped = 1 if segment.skipped and segment.skipped.mode == "stg-a" else 0
        return sum(per_skipped if block in skipped else 2 for block in segment.blocks)

    def activation_limit(self, segment: Segment, workload: Workload, rows: int) -> int:
        # Widest point: q, k, v, the hidden states and a 4x feed-forward, each allowed a float32 copy.
        linear = rows * (self.tokens(workload) + workload.text_length) * self.width * 4 * 16
        return linear + (8 << 20)

    def constants(self, text: TextCondition, workload: Workload, frame_rate: float) -> dict[str, Tensor]:
        from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed

        temporal, spatial = self.compression
        _, frames, height, width = self.latent_shape(workload)
        rope = LTXVideoRotaryPosEmbed(
            dim=self.width,
            base_num_frames=20,
            base_height=2048,
            base_width=2048,
            theta=10000.0,
        )
        scale = (temporal / frame_rate, spatial, spatial)
        cos, sin = rope(torch.zeros(1, 1), frames, height, width, scale)
        bias = (1 - text.mask.float()) * -10000.0
        return {
            "prompt_embeds": text.embeds,
            "text_bias": bias[:, None, None, :],
            "rope_cos": cos[0],
            "rope_sin": sin[0],
        }

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, workload: Workload) -> None:
        import numpy as np
        from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

        config = scheduler.config
        if not {"sigmas", "mu"} <= inspect.signature(scheduler.set_timesteps).parameters.keys():
            # LTXPipeline's own timesteps need both; any other scheduler makes its own.
            scheduler.set_timesteps(num_inference_steps)
            return
        mu = calculate_shift(
            self.tokens(workload),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)

    def text_tokens(self, pipeline: Any, prompt: str) -> int:
        return len(pipeline.tokenizer(prompt).input_ids)

    def encode_prompt(self, pipeline: Any, prompts: list[str], workload: Workload) -> TextCondition:
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=workload.text_length,
            device=pipeline.text_encoder.device,
        )
        return TextCondition(embeds, mask)

    def pack(self, latents: Tensor) -> Tensor:
        packed: Tensor = load_class(self.pipeline_class)._pack_latents(latents)
        return packed

    def decode(self, pipeline: Any, latents: Tensor, workload: Workload, **options: Any) -> Tensor:
        """`decode_timestep` and `decode_noise_scale` are those of diffusers' LTXPipeline."""
        from diffusers.utils.torch_utils import randn_tensor

        vae = pipeline.vae
        _, frames, height, width = self.latent_shape(workload)
        latents = pipeline._unpack_latents(latents, frames, height, width)
        latents = pipeline._denormalize_latents(
            latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
        ).to(vae.dtype)
        timestep = None
        if vae.config.timestep_conditioning:
            timestep = torch.full((len(latents),), float(options.get("decode_timestep", 0.0))).to(latents)
            scale = options.get("decode_noise_scale")
            scale = float(timestep[0]) if scale is None else float(scale)
            # diffusers' own: it also takes a list of generators, and those of another device.
            noise = randn_tensor(
                latents.shape, generator=options.get("generator"), device=latents.device, dtype=latents.dtype
            )
            latents = (1 - scale) * latents + scale * noise
        video: Tensor = vae.decode(latents, timestep, return_dict=False)[0]
        return video


class _TextProjection(SegmentModule):
    """Projects prompt embeddings to the model's width, once per call."""

    def __init__(self, transformer: Any, *borders: Any) -> None:
        super().__init__(*borders)
        self.caption_projection = transformer.caption_projection

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"text": self.caption_projection(tensors["prompt_embeds"])}


class _LTXSegment(SegmentModule):
    """Embedding, blocks and head over a transformer's own submodules, with float32 islands."""

    def __init__(self, transformer: Any, segment: Segment, *borders: Any) -> None:
        super().__init__(*borders)
        self.segment = segment
        self.blocks = nn.ModuleDict({str(i): transformer.transformer_blocks[i] for i in segment.blocks})
        if segment.front:
            self.proj_in, self.time_embed = transformer.proj_in, transformer.time_embed
        if segment.back:
            self.scale_shift_table = transformer.scale_shift_table
            self.norm_out, self.proj_out = transformer.norm_out, transformer.proj_out

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        state = dict(tensors)
        if self.segment.front:
            state["hidden_states"] = self.proj_in(state["latents"])
            temb, embedded = self.time_embed(state["timestep"], hidden_dtype=torch.float32)
            state["temb"], state["embedded_timestep"] = temb.unsqueeze(1), embedded.unsqueeze(1)
        skipped = self.segment.skipped
        for block in self.segment.blocks:
            mode = skipped.mode if skipped and block in skipped.blocks else None
            if mode != "stg-r":
                state["hidden_states"] = self.block(self.blocks[str(block)], state, mode == "stg-a")
        if self.segment.back:
            state["pred"] = self.head(state["hidden_states"], state["embedded_timestep"])
        return state

    def block(self, block: Any, state: dict[str, Tensor], values_only: bool) -> Tensor:
        """One LTXVideoTransformerBlock; residuals in the compute dtype, modulation in float32."""
        hidden = state["hidden_states"]
        dtype = hidden.dtype
        modulation: Tensor = block.scale_shift_table + state["temb"].unflatten(2, (6, -1))
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation.unbind(dim=2)
        normed = (_rms_norm(block.norm1, hidden) * (1 + scale) + shift).to(dtype)
        attended = self.self_attention(block.attn1, normed, state, values_only)
        hidden = hidden + (attended.float() * gate).to(dtype)
        hidden = hidden + self.cross_attention(block.attn2, hidden, state["text"], state["text_bias"])
        normed = (_rms_norm(block.norm2, hidden) * (1 + scale_ff) + shift_ff).to(dtype)
        out: Tensor = hidden + (block.ff(normed).float() * gate_ff).to(dtype)
        return out

    def self_attention(self, attn: Any, x: Tensor, state: dict[str, Tensor], values_only: bool) -> Tensor:
        """Attention with RoPE; to_out(V) for rows whose attention is skipped (stg-a)."""
        value = attn.to_v(x)
        if values_only:
            mixed = value
        else:
            rope = state["rope_cos"], state["rope_sin"]
            query = _rotate(_rms_norm(attn.norm_q, attn.to_q(x)), *rope).to(x.dtype)
            key = _rotate(_rms_norm(attn.norm_k, attn.to_k(x)), *rope).to(x.dtype)
            mixed = self.heads(attn, query, key, value)
        if KEEP_ATTENTION in state and not values_only:
            mixed = torch.where(state[KEEP_ATTENTION][:, None, None], mixed, value)
        out: Tensor = attn.to_out[0](mixed)
        return out

    def cross_attention(self, attn: Any, x: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        """Attention to the projected text under its additive mask."""
        query = _rms_norm(attn.norm_q, attn.to_q(x)).to(x.dtype)
        key = _rms_norm(attn.norm_k, attn.to_k(text)).to(x.dtype)
        out: Tensor = attn.to_out[0](self.heads(attn, query, key, attn.to_v(text), bias))
        return out

    def heads(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, bias: Any = None) -> Tensor:
        """Splits (rows, tokens, channels) into heads, attends and joins them again."""
        split = [x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)]
        return self.attend(split[0], split[1], split[2], bias).transpose(1, 2).flatten(2)

    def head(self, hidden: Tensor, embedded_timestep: Tensor) -> Tensor:
        """Adaptive layer norm and projection to the prediction."""
        shift, scale = (embedded_timestep.unsqueeze(2) + self.scale_shift_table).unbind(dim=2)
        normed = self.norm_out(hidden.float()) * (1 + scale) + shift
        pred: Tensor = self.proj_out(normed.to(hidden.dtype))
        return pred


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    """RMS norm over all channels, in float32."""
    normed: Tensor = F.rms_norm(x.float(), (x.shape[-1],), norm.weight, norm.eps)
    return normed


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs: (a, b) -> (a*cos - b*sin, b*cos + a*sin)."""
    real, imaginary = x.unflatten(2, (-1, 2)).unbind(-1)
    rotated = torch.stack([-imaginary, real], dim=-1).flatten(2)
    return x * cos + rotated * sin
