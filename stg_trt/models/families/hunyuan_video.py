"""HunyuanVideo, text- and image-to-video: a joint-attention DiT over patches of 1x2x2 latents.

Reproduces diffusers' HunyuanVideoTransformer3DModel, and HunyuanVideoPipeline and its image-to-video sibling.
Blocks are numbered in one row: first those with weights for each stream (double), then those with one set of
weights for both (single). These cross a cut: both streams and `temb`, made of timestep, embedded guidance and
pooled prompt. The text is refined by layers of its own that take the timestep, so it is no constant; its mean
over the real tokens, the mask and the RoPE tables are.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stg_trt.errors import InvalidRequest
from stg_trt.models.defaults import Defaults
from stg_trt.models.families import seen_prompts
from stg_trt.models.families.base import CONDITION, POOLED
from stg_trt.models.families.dit import State, gated, half_table
from stg_trt.models.families.double_single_blocks import VIDEO, DoubleSingleSegment, of_step
from stg_trt.models.families.given_frames import mixed_first_frame
from stg_trt.models.families.joint_attention import (
    JointAttentionDiT,
    modulated,
    modulation,
    projected,
)
from stg_trt.models.families.token_timesteps import TIMESTEP_INDEX
from stg_trt.models.image import ImageCondition, Images, Places, posterior_means
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload


class HunyuanVideoSegment(DoubleSingleSegment):
    """The refiner of the text, double and single blocks; modulation and norms in float32."""

    def take_embedding(self, transformer: Any) -> None:
        self.x_embedder, self.context_embedder = transformer.x_embedder, transformer.context_embedder
        self.time_text_embed = transformer.time_text_embed

    def take_head(self, transformer: Any) -> None:
        self.norm_out, self.proj_out = transformer.norm_out, transformer.proj_out

    def embed(self, state: State) -> State:
        embedder, waves = self.time_text_embed, self.time_text_embed.time_proj(state["timestep"])
        temb = embedder.timestep_embedder(waves)
        if "guidance" in state:
            temb = temb + embedder.guidance_embedder(embedder.time_proj(state["guidance"]))
        temb = temb + embedder.text_embedder(state[POOLED])
        if embedder.image_condition_type == "token_replace":
            clean = embedder.timestep_embedder(embedder.time_proj(torch.zeros_like(state["timestep"])))
            temb = torch.stack([temb, clean + embedder.text_embedder(state[POOLED])], 1)
        latents = state["latents"]
        if CONDITION in state:
            latents = torch.cat([latents, state[CONDITION]], 1)
        embedded = {"hidden_states": self.x_embedder(latents), "temb": temb}
        if "prompt_embeds" in state:
            embedded["encoder_hidden_states"] = self.refined(state, waves)
        return embedded

    def refined(self, state: State, waves: Tensor) -> Tensor:
        """The text after self-attention layers of its own, modulated by the timestep's waves."""
        embedder, embed = self.context_embedder, self.context_embedder.time_text_embed
        temb = embed.timestep_embedder(waves) + embed.text_embedder(state["text_mean"])
        text: Tensor = embedder.proj_in(state["prompt_embeds"])
        bias = state["key_bias"][..., -text.shape[1] :]
        for block in embedder.token_refiner.refiner_blocks:
            gate, gate_ff = modulation(block.norm_out.linear, temb).chunk(2, -1)
            query, key, value = projected(block.attn, block.norm1(text.float()).to(text.dtype), VIDEO)
            attended = self.attend(query, key, value, bias).transpose(1, 2).flatten(2)
            text = gated(text, block.attn.to_out[0](attended), gate)
            text = gated(text, block.ff(block.norm2(text.float()).to(text.dtype)), gate_ff)
        return text

    def head(self, state: State) -> Tensor:
        scale, shift = modulation(self.norm_out.linear, of_step(state["temb"])).chunk(2, -1)
        pred: Tensor = self.proj_out(modulated(self.norm_out.norm, state["hidden_states"], shift, scale))
        return pred

    def unpatch(self, pred: Tensor, grid: tuple[int, ...]) -> Tensor:
        patches = pred.unflatten(2, (-1, *self.patch)).unflatten(1, grid)
        # (rows, tokens in time, height, width, channels, latents in time, height, width)
        latents_first = patches.permute(0, 4, 1, 5, 2, 6, 3, 7)
        latents: Tensor = latents_first.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return latents


class HunyuanVideo(JointAttentionDiT):
    """HunyuanVideo, text- and image-to-video, as diffusers has it (Tencent, arXiv 2412.03603)."""

    name = "hunyuan-video"
    transformer_class = "HunyuanVideoTransformer3DModel"
    export_version = 3
    pipeline_class = "HunyuanVideoPipeline"
    has_text_segment = False
    takes_true_cfg = True
    block_counts = ("num_layers", "num_single_layers")
    text_constants = ("prompt_embeds", "text_mean", "key_bias")
    block_constants: tuple[str, ...] = ("key_bias", "rope_cos", "rope_sin")
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
        kind = self.config.get("image_condition_type")
        # The first frame's tokens are the picture's, and told to be clean; or it has channels beside latents.
        self.replaces, self.concatenates = kind == "token_replace", kind == "latent_concat"
        if kind is not None:
            self.pipeline_class = "HunyuanVideoImageToVideoPipeline"
            self.text_image_parts = ("image_processor",)
            # As that pipeline's own defaults; its 256 text tokens are beside those of the picture.
            self.defaults = replace(self.defaults, embedded_guidance=1.0, text_length=540)
        if self.replaces:
            self.block_constants = (*self.block_constants, TIMESTEP_INDEX)
        if self.concatenates:
            self.video_constants = (CONDITION,)

    @property
    def latent_channels(self) -> int:
        channels = self.integer("in_channels")
        return (channels - 1) // 2 if self.concatenates else channels

    @property
    def needed_images(self) -> tuple[str, ...]:
        return ("image",) if self.text_image_parts else ()

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
        self._check_channels()
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
        if self.text_image_parts:
            return
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
            TensorSpec("temb", "float32", (ROWS, *((2,) if self.replaces else ()), self.width)),
            *((TensorSpec(TIMESTEP_INDEX, "int64", (tokens,)),) if self.replaces else ()),
            *((TensorSpec(CONDITION, dtype, (ROWS, channels + 1, *latents)),) if self.concatenates else ()),
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
        if self.replaces:
            embedded += [self.timestep_channels, self.integer("pooled_projection_dim")]
        temb = sum(2 * width * (channels + width) for channels in embedded)
        refiner_layer = 2 * length * 12 * width**2 + 4 * length**2 * width + 2 * 2 * width**2
        text = 2 * length * self.text_channels * width + self.integer("num_refiner_layers") * refiner_layer
        return patches + temb + text

    def block_flops(self, block: int, workload: Workload) -> int:
        tokens = self.tokens(workload) + workload.text_length
        width, wide, times = self.width, self.feed_forward_width, 2 if self.replaces else 1
        if block < self.integer("num_layers"):
            return 2 * tokens * (4 * width**2 + 2 * width * wide) + 2 * 6 * (times + 1) * width**2
        return 2 * tokens * (3 * width**2 + width * wide + (width + wide) * width) + 2 * 3 * times * width**2

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

    def timestep_tables(self, workload: Workload, image: ImageCondition | None) -> dict[str, Tensor]:
        """The tokens of the first frame have the second timestep, which is 0."""
        if not self.replaces:
            return {}
        frames, *area = self.grid(workload)
        of_frames = (torch.arange(frames) == 0).long()
        return {TIMESTEP_INDEX: of_frames.repeat_interleave(math.prod(area))}

    def encode_images(
        self, pipeline: Any, images: Images, workload: Workload, videos: int, generator: Any
    ) -> ImageCondition:
        """The most likely latents of the first frame; nothing is drawn."""
        vae, size = pipeline.vae, (workload.height, workload.width)
        pixels = pipeline.video_processor.preprocess([*images.image], *size).to(vae.device, vae.dtype)
        first = posterior_means(vae, pixels[:, :, None])
        scaled = (first.float() * vae.config.scaling_factor).cpu()
        return mixed_first_frame(scaled, self.latent_shape(workload), videos, replaces=self.replaces)

    def returned(self, latents: Tensor, workload: Workload) -> Tensor:
        """Without the first latent frame, where it is the picture's alone."""
        return latents[:, :, 1:] if self.concatenates else latents

    def shown_frames(self, workload: Workload) -> int:
        return workload.num_frames - (self.compression[0] if self.concatenates else 0)

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

    def prompt_tokens(self, workload: Workload) -> int:
        length = workload.text_length
        return seen_prompts.room_beside_picture(length) if self.text_image_parts else length

    def text_tokens(self, pipeline: Any, prompt: str) -> int:
        if self.text_image_parts:
            seen_prompts.check_seeing(pipeline)
        return seen_prompts.tokens_in_template(pipeline, prompt)

    def encode_prompt(self, pipeline: Any, prompts: list[str], workload: Workload) -> TextCondition:
        embeds, pooled, mask = pipeline.encode_prompt(
            prompts, max_sequence_length=workload.text_length, device=pipeline.text_encoder.device
        )
        return TextCondition(embeds, mask, pooled)

    def encode_seen_prompt(
        self, pipeline: Any, prompts: list[str], pictures: Sequence[Any] | None, workload: Workload
    ) -> TextCondition:
        """As diffusers' pipeline: a negative prompt sees black, and as many tokens of it in both kinds."""
        interleave = 4 if self.replaces and pictures is not None else 2
        shown = pictures or [Image.new("RGB", (workload.width, workload.height))]
        return seen_prompts.encode_beside_pictures(pipeline, prompts, shown, interleave, workload.text_length)

    def vae_latents(self, pipeline: Any, latents: Tensor, workload: Workload) -> Tensor:
        scaled: Tensor = latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor
        return scaled

    def decode(self, pipeline: Any, latents: Tensor, workload: Workload, **options: Any) -> Iterator[Tensor]:
        for video in super().decode(pipeline, latents, workload):
            yield video[:, :, -self.shown_frames(workload) :]

    def _check_channels(self) -> None:
        """Refuses kinds of image-to-video that nobody has published, and a VAE of other channels."""
        kind, channels = self.config.get("image_condition_type"), self.latent_channels
        if kind not in (None, "token_replace", "latent_concat"):
            raise InvalidRequest(
                "checkpoint: expected image_condition_type token_replace or latent_concat, got "
                f"{kind!r} in transformer/config.json: download the checkpoint again"
            )
        if channels != self.integer("out_channels"):
            raise InvalidRequest(
                f"checkpoint: expected as many latents in in_channels as in out_channels, got {channels} and "
                f"{self.config['out_channels']} in transformer/config.json: download the checkpoint again"
            )
        latent_channels = (self.vae_config or {}).get("latent_channels", channels)
        if latent_channels != channels:
            raise InvalidRequest(
                f"checkpoint: expected latent_channels {channels} in vae/config.json, as the transformer's "
                f"in_channels, got {latent_channels}: the folder mixes two models, download it again"
            )
