"""HunyuanVideo text-to-video: a joint-attention DiT with two kinds of blocks, over patches of 1x2x2 latents.

Reproduces diffusers' HunyuanVideoTransformer3DModel and HunyuanVideoPipeline. Blocks are numbered in one row:
first those with weights for each stream (double), then those with one set of weights for both (single). These
cross a cut: both streams and `temb`, made of timestep, embedded guidance and pooled prompt. The text is
refined by layers of its own that take the timestep, so it is no constant; its mean over the real tokens, the
mask and the RoPE tables are.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stg_trt.errors import InvalidRequest
from stg_trt.models.families.base import POOLED, Defaults, vae_video
from stg_trt.models.families.dit import State, gated, half_table, rms_norm, rotate
from stg_trt.models.families.joint_attention import (
    QKV,
    JointAttentionDiT,
    JointAttentionSegment,
    modulation,
    split_heads,
)
from stg_trt.models.image import Places
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload

_VIDEO = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")


class HunyuanVideoSegment(JointAttentionSegment):
    """Double and single blocks; modulation and norms in float32, the rest in the compute dtype."""

    frequencies: Tensor

    def take_embedding(self, transformer: Any) -> None:
        self.x_embedder, self.context_embedder = transformer.x_embedder, transformer.context_embedder
        self.time_text_embed = transformer.time_text_embed
        # Made here: an engine's own exponential, a bit off, would turn the guidance by up to 4e-4 rad.
        half = transformer.time_text_embed.time_proj.num_channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=self.x_embedder.proj.weight.device)
        exponents = -math.log(10000) * steps / half
        self.register_buffer("frequencies", exponents.exp(), persistent=False)

    def take_head(self, transformer: Any) -> None:
        self.norm_out, self.proj_out = transformer.norm_out, transformer.proj_out

    def embed(self, state: State) -> State:
        embedder, waves = self.time_text_embed, self.waves(state["timestep"])
        temb = embedder.timestep_embedder(waves)
        if "guidance" in state:
            temb = temb + embedder.guidance_embedder(self.waves(state["guidance"]))
        temb = temb + embedder.text_embedder(state[POOLED])
        embedded = {"hidden_states": self.x_embedder(state["latents"]), "temb": temb}
        if "prompt_embeds" in state:
            embedded["encoder_hidden_states"] = self.refined(state, waves)
        return embedded

    def waves(self, values: Tensor) -> Tensor:
        """Cosines and sines (rows, channels) of a timestep or guidance (rows,)."""
        angles = values[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], 1)

    def refined(self, state: State, waves: Tensor) -> Tensor:
        """The text after self-attention layers of its own, modulated by the timestep's waves."""
        embedder, embed = self.context_embedder, self.context_embedder.time_text_embed
        temb = embed.timestep_embedder(waves) + embed.text_embedder(state["text_mean"])
        text: Tensor = embedder.proj_in(state["prompt_embeds"])
        bias = state["key_bias"][..., -text.shape[1] :]
        for block in embedder.token_refiner.refiner_blocks:
            gate, gate_ff = modulation(block.norm_out.linear, temb).chunk(2, -1)
            query, key, value = projected(block.attn, block.norm1(text.float()).to(text.dtype), _VIDEO)
            attended = self.attend(query, key, value, bias).transpose(1, 2).flatten(2)
            text = gated(text, block.attn.to_out[0](attended), gate)
            text = gated(text, block.ff(block.norm2(text.float()).to(text.dtype)), gate_ff)
        return text

    def block(self, block: Any, state: State, perturbed: bool) -> State:
        single = hasattr(block, "proj_mlp")
        return (self.single_block if single else self.double_block)(block, state, perturbed)

    def double_block(self, block: Any, state: State, perturbed: bool) -> State:
        """A block with weights for each stream."""
        video, text = state["hidden_states"], state["encoder_hidden_states"]
        shift, scale, gate, *video_ff = modulation(block.norm1.linear, state["temb"]).chunk(6, -1)
        text_shift, text_scale, text_gate, *text_ff = modulation(
            block.norm1_context.linear, state["temb"]
        ).chunk(6, -1)
        normed = modulated(block.norm1.norm, video, shift, scale)
        normed_text = modulated(block.norm1_context.norm, text, text_shift, text_scale)
        attended, attended_text = self.joint_attention(
            rotated(normed_qkv(block.attn, normed, _VIDEO), state, video.dtype),
            QKV(*(x.to(text.dtype) for x in normed_qkv(block.attn, normed_text, _TEXT))),
            state,
            perturbed,
        )
        video = gated(video, block.attn.to_out[0](attended), gate)
        text = gated(text, block.attn.to_add_out(attended_text), text_gate)
        return {
            "hidden_states": feed_forward(block.norm2, block.ff, video, *video_ff),
            "encoder_hidden_states": feed_forward(block.norm2_context, block.ff_context, text, *text_ff),
        }

    def single_block(self, block: Any, state: State, perturbed: bool) -> State:
        """A block with one set of weights, attention and feed-forward side by side."""
        tokens = state["hidden_states"].shape[1]
        both = torch.cat([state["hidden_states"], state["encoder_hidden_states"]], 1)
        shift, scale, gate = modulation(block.norm.linear, state["temb"]).chunk(3, -1)
        normed = modulated(block.norm.norm, both, shift, scale)
        qkv = normed_qkv(block.attn, normed, _VIDEO)
        attended = self.joint_attention(
            rotated(QKV(*(x[:, :, :tokens] for x in qkv)), state, both.dtype),
            QKV(*(x[:, :, tokens:].to(both.dtype) for x in qkv)),
            state,
            perturbed,
        )
        wide = torch.cat([torch.cat(attended, 1), block.act_mlp(block.proj_mlp(normed))], 2)
        both = gated(both, block.proj_out(wide), gate)
        return {"hidden_states": both[:, :tokens], "encoder_hidden_states": both[:, tokens:]}

    def head(self, state: State) -> Tensor:
        scale, shift = modulation(self.norm_out.linear, state["temb"]).chunk(2, -1)
        pred: Tensor = self.proj_out(modulated(self.norm_out.norm, state["hidden_states"], shift, scale))
        return pred

    def unpatch(self, pred: Tensor, grid: tuple[int, ...]) -> Tensor:
        patches = pred.unflatten(2, (-1, *self.patch)).unflatten(1, grid)
        # (rows, tokens in time, height, width, channels, latents in time, height, width)
        latents_first = patches.permute(0, 4, 1, 5, 2, 6, 3, 7)
        latents: Tensor = latents_first.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return latents


def modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift, in float32."""
    result: Tensor = norm(x.float()) * (1 + scale) + shift
    return result.to(x.dtype)


def feed_forward(norm: Any, ff: Any, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """The modulated feed-forward of one stream."""
    return gated(x, ff(modulated(norm, x, shift, scale)), gate)


def projected(attn: Any, x: Tensor, names: Sequence[str]) -> list[Tensor]:
    """Heads of one stream's queries, keys and values."""
    return [split_heads(attn, getattr(attn, name), x) for name in names[:3]]


def normed_qkv(attn: Any, x: Tensor, names: Sequence[str]) -> QKV:
    """Queries and keys of one stream, RMS-normed per head in float32, and its values."""
    query, key, value = projected(attn, x, names)
    return QKV(rms_norm(getattr(attn, names[3]), query), rms_norm(getattr(attn, names[4]), key), value)


def rotated(qkv: QKV, state: State, dtype: torch.dtype) -> QKV:
    """Queries and keys rotated by their positions, in float32, then in `dtype`."""
    rope = state["rope_cos"], state["rope_sin"]
    return QKV(rotate(qkv.query, *rope, dtype), rotate(qkv.key, *rope, dtype), qkv.value)


class HunyuanVideo(JointAttentionDiT):
    """HunyuanVideo text-to-video as diffusers has it (Tencent, arXiv 2412.03603)."""

    name = "hunyuan-video"
    transformer_class = "HunyuanVideoTransformer3DModel"
    export_version = 1
    pipeline_class = "HunyuanVideoPipeline"
    has_text_segment = False
    takes_true_cfg = True
    block_counts = ("num_layers", "num_single_layers")
    text_constants = ("prompt_embeds", "text_mean", "key_bias")
    block_constants = ("key_bias", "rope_cos", "rope_sin")
    # Embeddings of timestep, guidance and pooled text, and norms, which are applied in float32.
    float32_islands = r"time_text_embed\.|norm\w*\.(weight|bias)$"
    segment_class = HunyuanVideoSegment
    # Every published model has these.
    timestep_channels = 256
    defaults = Defaults(
        stg_mode="stg-r",
        stg_blocks=(2,),
        stg_scale=2.0,
        guidance_scale=1.0,
        rescale=0.0,
        num_inference_steps=50,
        frame_rate=24.0,
        text_length=256,
        embedded_guidance=6.0,
    )

    def __init__(self, *configs: Any) -> None:
        super().__init__(*configs)
        self.temb_constants = (POOLED,) if self.embedded_guidance is None else ("guidance", POOLED)

    @property
    def num_blocks(self) -> int:
        return sum(self.integer(name) for name in self.block_counts)

    @property
    def feed_forward_width(self) -> int:
        return int(self.width * self.config["mlp_ratio"])

    @property
    def text_channels(self) -> int:
        return self.integer("text_embed_dim")

    @property
    def compression(self) -> tuple[int, int]:
        return self.vae_integer("temporal_compression_ratio", 4), self.vae_integer(
            "spatial_compression_ratio", 8
        )

    @property
    def patch(self) -> tuple[int, int, int]:
        size = self.integer("patch_size")
        return self.integer("patch_size_t"), size, size

    @property
    def embedded_guidance(self) -> float | None:
        return self.defaults.embedded_guidance if self.config["guidance_embeds"] else None

    def block_of(self, weight_name: str) -> int | None:
        match = re.match(r"(single_)?transformer_blocks\.(\d+)\.", weight_name)
        if match is None:
            return None
        return int(match[2]) + (self.integer("num_layers") if match[1] else 0)

    def blocks(self, transformer: Any) -> Sequence[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def check(self, workload: Workload) -> None:
        self._check_text_to_video()
        for name, published in (("patch_size_t", 1), ("qk_norm", "rms_norm")):
            if self.config[name] != published:
                raise InvalidRequest(
                    f"checkpoint: expected {name} {published} in transformer/config.json, as in every "
                    f"published HunyuanVideo, got {self.config[name]}: use such a checkpoint"
                )
        ratio, axes = self.config["mlp_ratio"], self.config["rope_axes_dim"]
        if type(ratio) not in (int, float) or not 0 < ratio < math.inf:
            raise InvalidRequest(
                "checkpoint: expected mlp_ratio in transformer/config.json as a positive number, "
                f"got {ratio!r}: download the checkpoint again"
            )
        pairs = isinstance(axes, list | tuple) and all(type(n) is int and n > 0 and n % 2 == 0 for n in axes)
        if not pairs or len(axes) != 3 or sum(axes) != self.integer("attention_head_dim"):
            raise InvalidRequest(
                "checkpoint: expected rope_axes_dim in transformer/config.json as three even sizes that sum "
                f"to attention_head_dim, got {axes!r}: download the checkpoint again"
            )
        super().check(workload)

    def check_pipeline(self) -> None:
        for name in ("image_processor", "image_encoder"):
            given = self.model_index.get(name)
            if given not in (None, [None, None]):
                raise InvalidRequest(
                    f"checkpoint: expected HunyuanVideo without {name}, got {name} {given} in "
                    "model_index.json: image-to-video is not supported, use a text-to-video checkpoint"
                )

    def own_tensors(self, workload: Workload) -> tuple[TensorSpec, ...]:
        channels, *latents = self.latent_shape(workload)
        dtype, length, tokens = workload.dtype, workload.text_length, self.tokens(workload)
        table = (tokens, self.integer("attention_head_dim") // 2)
        guided = self.embedded_guidance is not None
        return (
            TensorSpec("latents", dtype, (ROWS, channels, *latents)),
            *((TensorSpec("guidance", "float32", (ROWS,)),) if guided else ()),
            TensorSpec(POOLED, "float32", (ROWS, self.integer("pooled_projection_dim"))),
            TensorSpec("text_mean", "float32", (ROWS, self.text_channels)),
            TensorSpec("hidden_states", dtype, (ROWS, *self.grid(workload), self.width)),
            TensorSpec("encoder_hidden_states", dtype, (ROWS, length, self.width)),
            TensorSpec("temb", "float32", (ROWS, self.width)),
            TensorSpec("key_bias", dtype, (ROWS, 1, 1, tokens + length)),
            TensorSpec("rope_cos", "float32", table),
            TensorSpec("rope_sin", "float32", table),
            TensorSpec("pred", dtype, (ROWS, channels, *latents)),
        )

    def text_flops(self, workload: Workload) -> int:
        return 0

    def front_flops(self, workload: Workload) -> int:
        length, width = workload.text_length, self.width
        patches = 2 * self.tokens(workload) * width * math.prod(self.patch) * self.integer("in_channels")
        # Two layers each: timestep, pooled prompt and guidance, and the refiner's timestep and mean text.
        embedded = [self.timestep_channels] * 2 + [self.integer("pooled_projection_dim"), self.text_channels]
        if self.embedded_guidance is not None:
            embedded.append(self.timestep_channels)
        temb = sum(2 * width * (channels + width) for channels in embedded)
        refiner_layer = 2 * length * 12 * width**2 + 4 * length**2 * width + 2 * 2 * width**2
        text = 2 * length * self.text_channels * width + self.integer("num_refiner_layers") * refiner_layer
        return patches + temb + text

    def block_flops(self, block: int, workload: Workload) -> int:
        tokens = self.tokens(workload) + workload.text_length
        width, wide = self.width, self.feed_forward_width
        if block < self.integer("num_layers"):
            return 2 * tokens * (4 * width**2 + 2 * width * wide) + 2 * 12 * width**2
        return 2 * tokens * (3 * width**2 + width * wide + (width + wide) * width) + 2 * 3 * width**2

    def back_flops(self, workload: Workload) -> int:
        channels = math.prod(self.patch) * self.integer("out_channels")
        return 2 * self.tokens(workload) * self.width * channels + 2 * 2 * self.width**2

    def attentions(self, segment: Segment) -> int:
        refines = "prompt_embeds" in self.borders(segment)[0]
        return super().attentions(segment) + (self.integer("num_refiner_layers") if refines else 0)

    def position_tables(
        self, workload: Workload, frame_rate: float, placed: Places = ()
    ) -> dict[str, Tensor]:
        """HunyuanVideo's positions do not depend on the frame rate."""
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed

        patch_t, patch, _ = self.patch
        rope = HunyuanVideoRotaryPosEmbed(
            patch, patch_t, self.config["rope_axes_dim"], self.config["rope_theta"]
        )
        cos, sin = rope(torch.zeros(1, *self.latent_shape(workload)))
        return {"rope_cos": half_table(cos), "rope_sin": half_table(sin)}

    def text_inputs(self, text: TextCondition, workload: Workload) -> dict[str, Tensor]:
        """Embeddings, their masks and means, and the embedded guidance."""
        assert text.pooled is not None
        mask = text.mask.float()
        if not mask.any(1).all():
            raise InvalidRequest(
                "prompt_attention_mask: expected a real token in every row, got a row without: embed an "
                "empty prompt instead"
            )
        inputs = {
            "prompt_embeds": text.embeds,
            "text_mean": (text.embeds.float() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True),
            POOLED: text.pooled,
            "key_bias": self.key_bias(mask, workload),
        }
        if self.embedded_guidance is not None:
            default = torch.full((len(mask),), self.embedded_guidance)
            inputs["guidance"] = 1000.0 * (default if text.guidance is None else text.guidance)
        return inputs

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, workload: Workload) -> None:
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1])
        else:
            scheduler.set_timesteps(num_inference_steps)

    def text_tokens(self, pipeline: Any, prompt: str) -> int:
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        templated = DEFAULT_PROMPT_TEMPLATE["template"].format(prompt)
        template = int(DEFAULT_PROMPT_TEMPLATE["crop_start"])
        return len(pipeline.tokenizer(templated).input_ids) - template

    def encode_prompt(self, pipeline: Any, prompts: list[str], workload: Workload) -> TextCondition:
        embeds, pooled, mask = pipeline.encode_prompt(
            prompts, max_sequence_length=workload.text_length, device=pipeline.text_encoder.device
        )
        return TextCondition(embeds, mask, pooled)

    def decode(self, pipeline: Any, latents: Tensor, workload: Workload, **options: Any) -> Tensor:
        vae = pipeline.vae
        return vae_video(vae, latents.to(vae.dtype) / vae.config.scaling_factor)

    def _check_text_to_video(self) -> None:
        """Refuses image-to-video checkpoints, which have the same class."""
        self.refuse_image_to_video("image_condition_type")
        channels = self.integer("in_channels")
        latent_channels = (self.vae_config or {}).get("latent_channels", channels)
        if latent_channels != channels:
            raise InvalidRequest(
                f"checkpoint: expected latent_channels {channels} in vae/config.json, as the transformer's "
                f"in_channels, got {latent_channels}: the folder mixes two models, download it again"
            )
