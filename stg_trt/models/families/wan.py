"""Wan 2.1 1.3B and 14B, Wan 2.2 A14B and TI2V-5B, text- and image-to-video: a DiT over 1x2x2 latents.

Reproduces diffusers' WanTransformer3DModel, WanPipeline and WanImageToVideoPipeline. These cross a cut: the
hidden states, the modulation of the blocks, and the embedded timestep `temb` that the head reads. Constant
over the steps: the projected text, of which padding is zeros and not masked, and the RoPE tables, one head's
for all heads. For image-to-video, channels beside the latents: those of a video that is empty but for the
first picture and the last, and a mask of its frames; and, in Wan 2.1, tokens beside the text's, which CLIP
makes of them. A14B is two such transformers: the second predicts where little noise is left. TI2V reads the
picture's latents in the place of the first frame, and is told that its tokens are clean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.config_file import positive_integer
from stg_trt.models.defaults import Defaults
from stg_trt.models.families.base import CONDITION, IMAGE_EMBEDS
from stg_trt.models.families.cross_attention import CrossAttentionDiT
from stg_trt.models.families.dit import half_table
from stg_trt.models.families.given_frames import (
    first_frame,
    first_frame_strength,
    given_frames,
    latent_statistics,
)
from stg_trt.models.families.modulated_blocks import IMAGE_TEXT, ModulatedSegment, PromptText
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.families.token_timesteps import (
    TIMESTEP_INDEX,
    TIMESTEP_LIMITS,
    timestep_tables,
    token_timestep_specs,
)
from stg_trt.models.image import CleanLatents, ImageCondition, Images, Places
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload

_TEXT_BESIDE_IMAGES = 512
# Of the tokens of one video of TI2V: the step's, and that of clean latents.
_TIMESTEPS = 2
# Of the published image encoder, CLIP ViT-H/14.
_CLIP = {"image_size": 224, "patch_size": 14}
_CLIP_FILE = "image_encoder/config.json"


class Wan(CrossAttentionDiT):
    """Wan 2.1 and 2.2 as diffusers has them (Wan-AI, arXiv 2503.20314)."""

    name = "wan2.1"
    transformer_class = "WanTransformer3DModel"
    export_version = 3
    pipeline_class = "WanPipeline"
    has_text_mask = False
    float32_components = frozenset({"vae", "image_encoder"})
    blocks_name = "blocks"
    modulation = "modulation"
    head_modulation = "temb"
    # Timestep MLP, modulation tables and norms, which are applied in float32.
    float32_islands = r"time_embedder\.|time_proj\.|scale_shift_table|norm"
    segment_class = ModulatedSegment
    defaults = Defaults(
        stg_mode="stg-r",
        stg_blocks=(8,),
        stg_scale=1.0,
        guidance_scale=5.0,
        rescale=0.0,
        num_inference_steps=50,
        frame_rate=16.0,
        text_length=512,
    )

    def __init__(self, *configs: Any) -> None:
        super().__init__(*configs)
        # What CLIP sees in the pictures is an input.
        self.sees = self.config.get("image_dim") is not None
        self.block_constants = ("text", *((IMAGE_TEXT,) if self.sees else ()), "rope_cos", "rope_sin")
        self.reads_channels = self.config.get("in_channels") != self.config.get("out_channels")
        if self.reads_channels:
            self.front_constants = (CONDITION,)
            self.optional_images = () if self.sees else ("last_image",)
            self.pipeline_class = "WanImageToVideoPipeline"
        # diffusers' word for a timestep per token.
        self.tells_tokens = bool(self.model_index.get("expand_timesteps"))
        if self.tells_tokens:
            self.front_constants += (TIMESTEP_LIMITS,)
            self.block_constants += (TIMESTEP_INDEX,)
            self.head_constants = (TIMESTEP_INDEX,)
            self.optional_images = ("image",)
            self.defaults = replace(self.defaults, frame_rate=24.0)
        if self.tells_tokens or self.boundary is not None:
            self.name = "wan2.2"

    @property
    def boundary(self) -> float | None:
        """Below which part of the training steps the second expert predicts; None if there is only one.

        Raises InvalidRequest for what is no such part.
        """
        ratio = self.model_index.get("boundary_ratio")
        if ratio is not None and not (type(ratio) in (int, float) and 0 <= ratio <= 1):
            raise InvalidRequest(
                f"checkpoint: expected boundary_ratio in model_index.json from 0 to 1, got {ratio!r}: "
                "download the checkpoint again"
            )
        return ratio

    @property
    def transformers(self) -> tuple[str, ...]:
        return ("transformer",) if self.boundary is None else ("transformer", "transformer_2")

    def experts(self, timesteps: Sequence[float], training_steps: int) -> tuple[int, ...]:
        if self.boundary is None:
            return super().experts(timesteps, training_steps)
        # In float32, as diffusers compares the scheduler's tensors.
        return tuple((torch.tensor(timesteps) < self.boundary * training_steps).int().tolist())

    @property
    def latent_channels(self) -> int:
        return self.integer("out_channels")

    @property
    def context_tokens(self) -> int:
        """Tokens of what CLIP sees; of a model for two pictures, in both. 0 for text-to-video."""
        if not self.sees:
            return 0
        if self.config.get("pos_embed_seq_len") is not None:
            return self.integer("pos_embed_seq_len")
        sizes = self.image_encoder_config or _CLIP
        side = positive_integer(sizes["image_size"], "image_size", _CLIP_FILE)
        return (side // positive_integer(sizes["patch_size"], "patch_size", _CLIP_FILE)) ** 2 + 1

    @property
    def needed_images(self) -> tuple[str, ...]:
        if not self.reads_channels:
            return ()
        return ("image", "last_image") if self.config.get("pos_embed_seq_len") is not None else ("image",)

    @property
    def image_parts(self) -> tuple[str, ...]:
        return ("image_encoder", "image_processor") if self.sees else ()

    @property
    def feed_forward_width(self) -> int:
        return self.integer("ffn_dim")

    @property
    def text_channels(self) -> int:
        return self.integer("text_dim")

    @property
    def timestep_channels(self) -> int:
        return self.integer("freq_dim")

    @property
    def compression(self) -> tuple[int, int]:
        return self.vae_integer("scale_factor_temporal", 4), self.vae_integer("scale_factor_spatial", 8)

    @property
    def patch(self) -> tuple[int, int, int]:
        patch = self.config["patch_size"]
        whole = isinstance(patch, list | tuple) and all(type(size) is int and size > 0 for size in patch)
        if not whole or len(patch) != 3 or patch[0] != 1:
            raise InvalidRequest(
                "checkpoint: expected patch_size in transformer/config.json as 1, rows, columns, "
                f"got {patch!r}: download the checkpoint again"
            )
        return patch[0], patch[1], patch[2]

    def check(self, workload: Workload) -> None:
        self._check_channels()
        super().check(workload)
        if self.sees and workload.text_length != _TEXT_BESIDE_IMAGES:
            raise InvalidRequest(
                f"text_length: expected {_TEXT_BESIDE_IMAGES}, the only one that diffusers' Wan takes beside "
                f"pictures, got {workload.text_length}: use {_TEXT_BESIDE_IMAGES}"
            )
        most, (temporal, spatial) = self.integer("rope_max_seq_len"), self.compression
        frames, height, width = self.grid(workload)
        _, rows, columns = self.patch
        for side, tokens, largest in (
            ("num_frames", frames, (most - 1) * temporal + 1),
            ("height", height, most * rows * spatial),
            ("width", width, most * columns * spatial),
        ):
            if tokens > most:
                raise InvalidRequest(
                    f"{side}: expected at most {largest}, the end of the position tables, "
                    f"got {getattr(workload, side)}: use {largest}"
                )

    def check_pipeline(self) -> None:
        if self.tells_tokens and (self.reads_channels or self.boundary is not None):
            raise InvalidRequest(
                "checkpoint: expected expand_timesteps in model_index.json for Wan 2.2 TI2V alone, got it "
                "beside boundary_ratio or more in_channels than out_channels: download it again"
            )
        # diffusers writes a part that is not there as two nulls.
        second = self.model_index.get("transformer_2") not in (None, [None, None])
        if second != (self.boundary is not None):
            raise InvalidRequest(
                "checkpoint: expected transformer_2 and boundary_ratio in model_index.json, or neither, got "
                f"{'a' if second else 'no'} transformer_2 and boundary_ratio {self.boundary}: download it "
                "again"
            )

    def own_tensors(self, workload: Workload) -> tuple[TensorSpec, ...]:
        channels, *latents = self.latent_shape(workload)
        tokens = self.tokens(workload)
        table = (tokens, self.integer("attention_head_dim") // 2)
        timesteps = (ROWS, _TIMESTEPS) if self.tells_tokens else (ROWS,)
        return (
            TensorSpec("latents", workload.dtype, (ROWS, channels, *latents)),
            *self._image_tensors(workload),
            TensorSpec("hidden_states", workload.dtype, (ROWS, *self.grid(workload), self.width)),
            TensorSpec("modulation", "float32", (*timesteps, 6, self.width)),
            TensorSpec("temb", "float32", (*timesteps, self.width)),
            *(token_timestep_specs(tokens, _TIMESTEPS) if self.tells_tokens else ()),
            TensorSpec("rope_cos", "float32", table),
            TensorSpec("rope_sin", "float32", table),
            TensorSpec("pred", workload.dtype, (ROWS, channels, *latents)),
        )

    def _image_tensors(self, workload: Workload) -> list[TensorSpec]:
        """Of the channels beside the latents, and of the tokens beside the text."""
        found = []
        if self.reads_channels:
            _, *latents = self.latent_shape(workload)
            channels = self.integer("in_channels") - self.latent_channels
            found.append(TensorSpec(CONDITION, workload.dtype, (ROWS, channels, *latents)))
        if self.sees:
            shape = (ROWS, self.context_tokens, self.integer("image_dim"))
            found.append(TensorSpec(IMAGE_EMBEDS, workload.dtype, shape))
            found.append(TensorSpec(IMAGE_TEXT, workload.dtype, (*shape[:2], self.width)))
        return found

    def text_borders(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (
            (("prompt_embeds", IMAGE_EMBEDS), ("text", IMAGE_TEXT)) if self.sees else super().text_borders()
        )

    def text_module(self, transformer: Any, *borders: Any) -> SegmentModule:
        return PromptText(transformer.condition_embedder, *borders)

    def context_flops(self) -> int:
        seen = self.integer("image_dim") if self.sees else 0
        return 2 * self.context_tokens * seen * (seen + self.width)

    def encode_images(
        self, pipeline: Any, images: Images, workload: Workload, videos: int, generator: Any
    ) -> ImageCondition:
        """The most likely latents of the video around the pictures; nothing is drawn."""
        if self.tells_tokens:
            return first_frame(pipeline, images, self.latent_shape(workload), workload, videos)
        sets = [images.image, images.last_image] if images.last_image else [images.image]
        channels, context = given_frames(pipeline, sets, workload, self.compression[0]), None
        if self.sees:
            device = pipeline.image_encoder.device
            seen = [pipeline.encode_image([*pictures], device) for pictures in zip(*sets, strict=True)]
            context = torch.stack([tokens.flatten(0, 1) for tokens in seen])
        return ImageCondition(
            channels.expand(videos, *channels.shape[1:]),
            None if context is None else context.expand(videos, *context.shape[1:]),
        )

    def random_image(
        self, workload: Workload, rows: int, generator: torch.Generator
    ) -> ImageCondition | None:
        """With the first frame clean, so that both timesteps are compared."""
        if not self.tells_tokens:
            return super().random_image(workload, rows, generator)
        return ImageCondition(clean=CleanLatents(first_frame_strength(self.latent_shape(workload))))

    def timestep_tables(self, workload: Workload, image: ImageCondition | None) -> dict[str, Tensor]:
        if not self.tells_tokens:
            return {}
        strengths = torch.zeros(self.grid(workload))
        if image is not None and image.clean is not None:
            strengths += image.clean.strength[0]
        return timestep_tables(strengths.flatten(), _TIMESTEPS)

    def finished(self, latents: Tensor, workload: Workload, image: ImageCondition | None) -> Tensor:
        """With the picture's latents for the last time."""
        if image is None or image.clean is None or image.clean.replaced_by is None:
            return latents
        clean = image.clean.strength.to(latents.device) > 0
        return torch.where(clean, image.clean.replaced_by.to(latents), latents)

    def position_tables(
        self, workload: Workload, frame_rate: float, placed: Places = ()
    ) -> dict[str, Tensor]:
        """Wan's positions do not depend on the frame rate."""
        from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

        head_dim, most = self.integer("attention_head_dim"), self.integer("rope_max_seq_len")
        cos, sin = WanRotaryPosEmbed(head_dim, self.patch, most)(torch.zeros(1, *self.latent_shape(workload)))
        return {"rope_cos": half_table(cos[0, :, 0]), "rope_sin": half_table(sin[0, :, 0])}

    def text_inputs(self, text: TextCondition, workload: Workload) -> dict[str, Tensor]:
        """The embeddings, zero where the mask is."""
        return {"prompt_embeds": text.embeds * text.mask[:, :, None].to(text.embeds)}

    def text_tokens(self, pipeline: Any, prompt: str) -> int:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return len(pipeline.tokenizer(prompt_clean(prompt)).input_ids)

    def encode_prompt(self, pipeline: Any, prompts: list[str], workload: Workload) -> TextCondition:
        embeds, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=workload.text_length,
            device=pipeline.text_encoder.device,
        )
        real = torch.tensor([[self.text_tokens(pipeline, prompt)] for prompt in prompts])
        return TextCondition(embeds, (torch.arange(workload.text_length) < real).to(embeds))

    def vae_latents(self, pipeline: Any, latents: Tensor, workload: Workload) -> Tensor:
        mean, std = latent_statistics(pipeline.vae, latents.device)
        return (latents * std + mean).to(pipeline.vae.dtype)

    def _check_channels(self) -> None:
        """Refuses channels that no published model has, and a VAE of another model."""
        channels, vae = self.latent_channels, self.vae_config or {}
        with_image = 2 * channels + self.compression[0]
        if self.integer("in_channels") not in (channels, with_image):
            raise InvalidRequest(
                f"checkpoint: expected in_channels {channels} in transformer/config.json, as out_channels, "
                f"or {with_image} for image-to-video, got {self.config['in_channels']}: download it again"
            )
        if self.sees and not self.reads_channels:
            raise InvalidRequest(
                "checkpoint: expected image_dim in transformer/config.json of image-to-video, and only "
                f"there, got {self.config['image_dim']}: download it again"
            )
        if (vae.get("is_residual") or vae.get("patch_size")) and not self.tells_tokens:
            raise InvalidRequest(
                "checkpoint: expected the VAE of Wan 2.1, got one with is_residual or patch_size in "
                "vae/config.json, and no expand_timesteps in model_index.json: download it again"
            )
        if vae.get("z_dim", channels) != channels:
            raise InvalidRequest(
                f"checkpoint: expected z_dim {channels} in vae/config.json, as the transformer's "
                f"out_channels, got {vae['z_dim']}: the folder mixes two models, download it again"
            )
