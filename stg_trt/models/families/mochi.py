"""Mochi 1: blocks that attend over video and text together, each stream with a width of its own.

Reproduces diffusers' MochiTransformer3DModel and MochiPipeline. These cross a cut: both streams, and the
embedded timestep `temb` with the pooled prompt in it. Constant over the steps: the projected and the pooled
prompt, its mask, and the positions of the tokens. Each segment makes its RoPE tables of them: every head has
its own, too large to be kept.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stg_trt.errors import InvalidRequest
from stg_trt.models.config_file import positive_integer
from stg_trt.models.defaults import Defaults
from stg_trt.models.families.dit import State, rms_norm, rotate, unpatched
from stg_trt.models.families.joint_attention import (
    KV,
    MASKED,
    QKV,
    JointAttentionDiT,
    JointAttentionSegment,
    modulation,
    split_heads,
)
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.image import Places
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload

# Of MochiPipeline's sigmas: half of the steps are linear, and go this far.
_THRESHOLD_NOISE = 0.025


class MochiText(SegmentModule):
    """The prompt projected to the width of the text stream, and pooled to that of the video.

    The pooling attends with one query, the mean of the real tokens, over them and itself. It is written out:
    its heads are too large for a kernel.
    """

    def __init__(self, time_embed: Any, *borders: Any) -> None:
        super().__init__(*borders)
        self.caption_proj, self.pooler = time_embed.caption_proj, time_embed.pooler

    def run(self, tensors: State) -> State:
        embeds, mask = tensors["prompt_embeds"], tensors["text_mask"]
        return {"text": self.caption_proj(embeds), "pooled_text": self.pooled(embeds, mask)}

    def pooled(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """(rows, width) of (rows, tokens, channels) and their mask."""
        heads, dtype = self.pooler.num_attention_heads, embeds.dtype
        shares = mask / mask.sum(1, keepdim=True).clamp(min=1)
        mean = (embeds.float() * shares[:, :, None]).sum(1, keepdim=True).to(dtype)
        query = self.pooler.to_q(mean).unflatten(2, (heads, -1)).float()
        key_value = self.pooler.to_kv(torch.cat([mean, embeds], 1))
        key, value = key_value.unflatten(2, (2, heads, -1)).float().unbind(2)
        bias = F.pad((1 - mask) * MASKED, (1, 0))
        logits = (query * key).sum(-1) * query.shape[-1] ** -0.5 + bias[:, :, None]
        attended = (logits.softmax(1)[..., None] * value).sum(1).flatten(1)
        out: Tensor = self.pooler.to_out(attended.to(dtype))
        return out.float()


class MochiSegment(JointAttentionSegment):
    """MochiTransformerBlocks; residuals in the compute dtype, norms and their scales in float32."""

    pos_frequencies: nn.Parameter

    def take_embedding(self, transformer: Any) -> None:
        self.patch_embed = transformer.patch_embed.proj
        self.time_proj = transformer.time_embed.time_proj
        self.timestep_embedder = transformer.time_embed.timestep_embedder

    def take_head(self, transformer: Any) -> None:
        self.norm_out, self.proj_out = transformer.norm_out, transformer.proj_out

    def run(self, tensors: State) -> State:
        if "positions" in tensors:
            tensors = tensors | rope_tables(tensors["positions"], self.pos_frequencies)
        return super().run(tensors)

    def embed(self, state: State) -> State:
        weight = self.patch_embed.weight.unsqueeze(2)
        patches = F.conv3d(state["latents"], weight, self.patch_embed.bias, stride=self.patch)
        temb = self.timestep_embedder(self.time_proj(state["timestep"])) + state["pooled_text"]
        text = {"encoder_hidden_states": state["text"]} if "text" in state else {}
        return {"hidden_states": patches.flatten(2).transpose(1, 2), "temb": temb, **text}

    def block(self, block: Any, state: State, perturbed: bool) -> State:
        attn, temb = block.attn1, state["temb"]
        hidden, text = state["hidden_states"], state["encoder_hidden_states"]
        scale, *gates = modulation(block.norm1.linear, temb).chunk(4, -1)
        normed = scaled_norm(block.norm1.norm, hidden, 1 + scale)
        video_qkv = self.video_qkv(attn, normed, state)
        if block.context_pre_only:
            scale = modulation(block.norm1_context.linear_1, temb)
            text_kv = self.text_kv(attn, scaled_norm(block.norm1_context.norm.norm, text, 1 + scale))
            attended = self.video_attention(video_qkv, text_kv, state, perturbed)
            return {"hidden_states": self.after_attention(block, "", hidden, attn.to_out[0](attended), gates)}
        scale, *text_gates = modulation(block.norm1_context.linear, temb).chunk(4, -1)
        normed = scaled_norm(block.norm1_context.norm, text, 1 + scale)
        text_query = rms_norm(attn.norm_added_q, split_heads(attn, attn.add_q_proj, normed)).to(text.dtype)
        text_qkv = QKV(text_query, *self.text_kv(attn, normed))
        attended, attended_text = self.joint_attention(video_qkv, text_qkv, state, perturbed)
        attended, attended_text = attn.to_out[0](attended), attn.to_add_out(attended_text)
        return {
            "hidden_states": self.after_attention(block, "", hidden, attended, gates),
            "encoder_hidden_states": self.after_attention(block, "_context", text, attended_text, text_gates),
        }

    def video_qkv(self, attn: Any, x: Tensor, state: State) -> QKV:
        """Queries and keys normed and rotated in float32."""
        query, key, value = (split_heads(attn, linear, x) for linear in (attn.to_q, attn.to_k, attn.to_v))
        cos, sin = state["rope_cos"], state["rope_sin"]
        query = rotate(rms_norm(attn.norm_q, query), cos, sin, x.dtype)
        key = rotate(rms_norm(attn.norm_k, key), cos, sin, x.dtype)
        return QKV(query, key, value)

    def text_kv(self, attn: Any, x: Tensor) -> KV:
        """Keys normed in float32; text has no positions."""
        key, value = (split_heads(attn, linear, x) for linear in (attn.add_k_proj, attn.add_v_proj))
        return KV(rms_norm(attn.norm_added_k, key).to(x.dtype), value)

    def after_attention(
        self, block: Any, stream: str, hidden: Tensor, attended: Tensor, gates: list[Tensor]
    ) -> Tensor:
        """Both residuals of a stream; its modules' names end with `stream`."""
        gate, scale, gate_ff = gates
        norm2, norm3, norm4 = (getattr(block, f"norm{i}{stream}").norm for i in (2, 3, 4))
        hidden = hidden + scaled_norm(norm2, attended, gate.tanh())
        normed = scaled_norm(norm3, hidden, 1 + scale)
        return hidden + scaled_norm(norm4, getattr(block, f"ff{stream}")(normed), gate_ff.tanh())

    def head(self, state: State) -> Tensor:
        hidden = state["hidden_states"]
        scale, shift = modulation(self.norm_out.linear, state["temb"]).chunk(2, -1)
        normed = self.norm_out.norm(hidden.float()) * (1 + scale) + shift
        pred: Tensor = self.proj_out(normed.to(hidden.dtype))
        return pred

    def unpatch(self, pred: Tensor, grid: tuple[int, ...]) -> Tensor:
        return unpatched(pred, grid, self.patch)


def rope_tables(positions: Tensor, frequencies: Tensor) -> State:
    """cos and sin of positions (tokens, 3) times frequencies (3, heads, half a head): (heads, tokens, half).

    Not as a matrix product, whose factors a GPU may round to 10 bits.
    """
    time, height, width = (positions[:, i, None] * frequencies[i, :, None] for i in range(3))
    angles = time + height + width
    return {"rope_cos": angles.cos(), "rope_sin": angles.sin()}


def scaled_norm(norm: Any, x: Tensor, scale: Tensor) -> Tensor:
    """RMS norm times a scale in float32, back in the dtype of `x`."""
    normed: Tensor = (rms_norm(norm, x) * scale).to(x.dtype)
    return normed


class Mochi(JointAttentionDiT):
    """Mochi 1 preview as diffusers has it (Genmo, github.com/genmoai/mochi)."""

    name = "mochi"
    transformer_class = "MochiTransformer3DModel"
    export_version = 1
    pipeline_class = "MochiPipeline"
    blocks_name = "transformer_blocks"
    block_constants = ("key_bias", "positions")
    text_constants = ("text",)
    temb_constants = ("pooled_text",)
    text_borders = (("prompt_embeds", "text_mask"), ("text", "pooled_text"))
    # Timestep MLP, frequencies, and the norms of queries and keys: the others have no weights.
    float32_islands = r"timestep_embedder\.|pos_frequencies|norm_(added_)?[qk]\."
    shared_weights = frozenset({"pos_frequencies"})
    segment_class = MochiSegment
    defaults = Defaults(
        stg_mode="stg-r",
        stg_blocks=(34,),
        stg_scale=1.0,
        guidance_scale=4.5,
        rescale=0.0,
        num_inference_steps=64,
        frame_rate=30.0,
        text_length=256,
    )

    @property
    def feed_forward_width(self) -> int:
        return 8 * self.width // 3

    @property
    def text_width(self) -> int:
        """Channels of the text stream."""
        return self.integer("pooled_projection_dim")

    @property
    def text_channels(self) -> int:
        return self.integer("text_embed_dim")

    @property
    def timestep_channels(self) -> int:
        return self.integer("time_embed_dim")

    @property
    def compression(self) -> tuple[int, int]:
        return self._expansion("temporal_expansions", 6), self._expansion("spatial_expansions", 8)

    @property
    def patch(self) -> tuple[int, int, int]:
        size = self.integer("patch_size")
        return 1, size, size

    def check(self, workload: Workload) -> None:
        self._check_config()
        super().check(workload)
        most = self.integer("max_sequence_length")
        if workload.text_length > most:
            raise InvalidRequest(
                f"text_length: expected at most {most} tokens, got {workload.text_length}: use {most}"
            )

    def own_tensors(self, workload: Workload) -> tuple[TensorSpec, ...]:
        channels, *latents = self.latent_shape(workload)
        tokens, text, dtype = self.tokens(workload), workload.text_length, workload.dtype
        return (
            TensorSpec("latents", dtype, (ROWS, channels, *latents)),
            TensorSpec("text_mask", "float32", (ROWS, text)),
            TensorSpec("text", dtype, (ROWS, text, self.text_width)),
            TensorSpec("pooled_text", "float32", (ROWS, self.width)),
            TensorSpec("hidden_states", dtype, (ROWS, *self.grid(workload), self.width)),
            TensorSpec("encoder_hidden_states", dtype, (ROWS, text, self.text_width)),
            TensorSpec("temb", "float32", (ROWS, self.width)),
            TensorSpec("key_bias", dtype, (ROWS, 1, 1, tokens + text)),
            TensorSpec("positions", "float32", (tokens, 3)),
            TensorSpec("pred", dtype, (ROWS, channels, *latents)),
        )

    def text_module(self, transformer: Any, *borders: Any) -> SegmentModule:
        return MochiText(transformer.time_embed, *borders)

    def module(self, transformer: Any, segment: Segment, *, expand_masks: bool) -> SegmentModule:
        module = super().module(transformer, segment, expand_masks=expand_masks)
        if "positions" in module.inputs:
            module.pos_frequencies = transformer.pos_frequencies
        return module

    def reads_into_text(self, block: int) -> bool:
        return block != self.num_blocks - 1

    def text_flops(self, workload: Workload) -> int:
        text, channels = workload.text_length, self.text_channels
        pooling = (text + 1) * 2 * channels**2 + channels**2 + channels * self.width
        return 2 * (text * channels * self.text_width + pooling)

    def front_flops(self, workload: Workload) -> int:
        patches = self.tokens(workload) * math.prod(self.patch) * self.integer("in_channels")
        return 2 * self.width * (patches + self.timestep_channels + self.width)

    def block_flops(self, block: int, workload: Workload) -> int:
        width, text_width = self.width, self.text_width
        keys_and_values = 2 * width * text_width
        video = 4 * width**2 + 3 * width * self.feed_forward_width
        if not self.reads_into_text(block):
            per_row = 4 * width**2 + width * text_width
            return 2 * (self.tokens(workload) * video + workload.text_length * keys_and_values + per_row)
        text = 2 * keys_and_values + 3 * text_width * (8 * text_width // 3)
        per_row = 4 * width**2 + 4 * width * text_width
        return 2 * (self.tokens(workload) * video + workload.text_length * text + per_row)

    def back_flops(self, workload: Workload) -> int:
        patches = self.tokens(workload) * math.prod(self.patch) * self.integer("in_channels")
        return 2 * self.width * (patches + 2 * self.width)

    def position_tables(
        self, workload: Workload, frame_rate: float, placed: Places = ()
    ) -> dict[str, Tensor]:
        """Mochi's positions do not depend on the frame rate."""
        from diffusers.models.transformers.transformer_mochi import MochiRoPE

        return {"positions": MochiRoPE()._get_positions(*self.grid(workload), dtype=torch.float32)}

    def text_inputs(self, text: TextCondition, workload: Workload) -> dict[str, Tensor]:
        """The embeddings and their masks."""
        mask = text.mask.float()
        return {
            "prompt_embeds": text.embeds,
            "text_mask": mask,
            "key_bias": self.key_bias(mask, workload),
        }

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, workload: Workload) -> None:
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise InvalidRequest(
                f"scheduler: expected one that takes sigmas, as Mochi's pipeline gives them, got "
                f"{type(scheduler).__name__}: use FlowMatchEulerDiscreteScheduler with invert_sigmas"
            )
        if num_inference_steps < 2:
            raise InvalidRequest(
                f"num_inference_steps: expected at least 2, a linear and a quadratic one, got "
                f"{num_inference_steps}: use {self.defaults.num_inference_steps}"
            )
        scheduler.set_timesteps(sigmas=linear_quadratic_schedule(num_inference_steps, _THRESHOLD_NOISE))

    def encode_prompt(self, pipeline: Any, prompts: list[str], workload: Workload) -> TextCondition:
        # One by one: when diffusers turns empty prompts into zeros, it looks only at the last of several.
        texts = []
        for prompt in prompts:
            embeds, mask, _, _ = pipeline.encode_prompt(
                prompt,
                do_classifier_free_guidance=False,
                max_sequence_length=workload.text_length,
                device=pipeline.text_encoder.device,
            )
            texts.append(TextCondition(embeds, mask.float()))
        return TextCondition.stacked(texts)

    def vae_latents(self, pipeline: Any, latents: Tensor, workload: Workload) -> Tensor:
        vae = pipeline.vae
        latents = latents / vae.config.scaling_factor
        moments = vae.config.latents_mean, vae.config.latents_std
        if None not in moments:
            mean, std = (torch.tensor(m, device=latents.device)[:, None, None, None] for m in moments)
            latents = latents * std + mean
        return latents.to(vae.dtype)

    def _expansion(self, name: str, published: int) -> int:
        """Pixels per latent: the product of the VAE's expansions, or the published VAE's."""
        factors = (self.vae_config or {}).get(name)
        if factors is None:
            return published
        if not isinstance(factors, list | tuple):
            raise InvalidRequest(
                f"checkpoint: expected {name} in vae/config.json as a list, got {factors!r}: "
                "download the checkpoint again"
            )
        return math.prod(positive_integer(factor, name, "vae/config.json") for factor in factors)

    def _check_config(self) -> None:
        """Refuses configurations that no published Mochi has."""
        channels = self.integer("in_channels")
        latents = (self.vae_config or {}).get("latent_channels", channels)
        for name, file, expected, got in (
            ("activation_fn", "transformer", "swiglu", self.config["activation_fn"]),
            ("out_channels", "transformer", channels, self.config.get("out_channels") or channels),
            ("latent_channels", "vae", channels, latents),
        ):
            if got != expected:
                raise InvalidRequest(
                    f"checkpoint: expected {name} {expected} in {file}/config.json, as every published Mochi "
                    f"has it, got {got}: use a checkpoint of Mochi 1 text-to-video"
                )
