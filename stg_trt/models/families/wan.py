"""Wan 2.1 1.3B and 14B, Wan 2.2 A14B, text- and image-to-video: a DiT over patches of 1x2x2 latents.

Reproduces diffusers' WanTransformer3DModel, WanPipeline and WanImageToVideoPipeline. These cross a cut: the
hidden states, the modulation of the blocks, and the embedded timestep `temb` that the head reads. Constant
over the steps: the projected text, of which padding is zeros and not masked, and the RoPE tables, one head's
for all heads. For image-to-video, channels beside the latents: those of a video that is empty but for the
first picture and the last, and a mask of its frames; and, in Wan 2.1, tokens beside the text's, which CLIP
makes of them. A14B is two such transformers: the second predicts where little noise is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.families.base import CONDITION, IMAGE_EMBEDS, Defaults, positive_integer, vae_video
from stg_trt.models.families.cross_attention import CrossAttentionDiT, CrossAttentionSegment
from stg_trt.models.families.dit import State, gated, half_table, rotate, unpatched
from stg_trt.models.families.given_frames import given_frames, latent_statistics
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.image import ImageCondition, Images, Places
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload

_IMAGE = "image_text"
_TEXT_BESIDE_IMAGES = 512
# Of the published image encoder, CLIP ViT-H/14.
_CLIP = {"image_size": 224, "patch_size": 14}
_CLIP_FILE = "image_encoder/config.json"


class WanSegment(CrossAttentionSegment):
    """WanTransformerBlocks; residuals and modulation in float32, the rest in the compute dtype."""

    def take_embedding(self, transformer: Any) -> None:
        embedder = transformer.condition_embedder
        self.patch_embedding = transformer.patch_embedding
        self.timesteps_proj, self.time_embedder = embedder.timesteps_proj, embedder.time_embedder
        self.time_proj = embedder.time_proj

    def take_head(self, transformer: Any) -> None:
        self.scale_shift_table = transformer.scale_shift_table
        self.norm_out, self.proj_out = transformer.norm_out, transformer.proj_out

    def embed(self, state: State) -> State:
        latents = state["latents"]
        if CONDITION in state:
            latents = torch.cat([latents, state[CONDITION]], 1)
        temb = self.time_embedder(self.timesteps_proj(state["timestep"]))
        return {
            "hidden_states": self.patch_embedding(latents).flatten(2).transpose(1, 2),
            "modulation": self.time_proj(torch.nn.functional.silu(temb)).unflatten(1, (6, -1)),
            "temb": temb,
        }

    def block(self, block: Any, state: State, perturbed: bool) -> State:
        hidden = state["hidden_states"]
        dtype = hidden.dtype
        modulation: Tensor = block.scale_shift_table + state["modulation"]
        shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=1)
        normed = (block.norm1(hidden.float()) * (1 + scale) + shift).to(dtype)
        attended = self.self_attention(block.attn1, normed, state, perturbed)
        hidden = gated(hidden, attended, gate)
        normed = block.norm2(hidden.float()).to(dtype)
        hidden = hidden + self.cross_attention(block.attn2, normed, state["text"], image=state.get(_IMAGE))
        normed = (block.norm3(hidden.float()) * (1 + scale_ff) + shift_ff).to(dtype)
        return {"hidden_states": gated(hidden, block.ffn(normed), gate_ff)}

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        heads = x.unflatten(2, (-1, 2 * cos.shape[-1]))
        return rotate(heads, cos[:, None], sin[:, None], dtype).flatten(2)

    def head(self, state: State) -> Tensor:
        hidden = state["hidden_states"]
        shift, scale = (self.scale_shift_table + state["temb"].unsqueeze(1)).chunk(2, dim=1)
        normed = self.norm_out(hidden.float()) * (1 + scale) + shift
        pred: Tensor = self.proj_out(normed.to(hidden.dtype))
        return pred

    def unpatch(self, pred: Tensor, grid: tuple[int, ...]) -> Tensor:
        return unpatched(pred, grid, self.patch)


class WanText(SegmentModule):
    """The projected prompt, and beside it what CLIP sees in the pictures."""

    def __init__(self, embedder: Any, *borders: Any) -> None:
        super().__init__(*borders)
        self.projection, self.image = embedder.text_embedder, embedder.image_embedder

    def run(self, tensors: State) -> State:
        made: State = {"text": self.projection(tensors["prompt_embeds"])}
        if self.image is not None:
            seen, positions = tensors[IMAGE_EMBEDS], self.image.pos_embed
            seen = self.image.norm1(seen if positions is None else seen + positions)
            made[_IMAGE] = self.image.norm2(self.image.ff(seen))
        return made


class Wan(CrossAttentionDiT):
    """Wan 2.1, and 2.2 A14B, as diffusers has them (Wan-AI, arXiv 2503.20314)."""

    name = "wan2.1"
    transformer_class = "WanTransformer3DModel"
    export_version = 1
    pipeline_class = "WanPipeline"
    has_text_mask = False
    float32_components = frozenset({"vae", "image_encoder"})
    blocks_name = "blocks"
    modulation = "modulation"
    head_modulation = "temb"
    # Timestep MLP, modulation tables and norms, which are applied in float32.
    float32_islands = r"time_embedder\.|time_proj\.|scale_shift_table|norm"
    segment_class = WanSegment
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
        self.block_constants = ("text", *((_IMAGE,) if self.sees else ()), "rope_cos", "rope_sin")
        if self.config.get("in_channels") != self.config.get("out_channels"):
            self.front_constants = (CONDITION,)
            self.optional_images = () if self.sees else ("last_image",)
            self.pipeline_class = "WanImageToVideoPipeline"
        if self.boundary is not None:
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
        if not self.front_constants:
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
        if self.model_index.get("expand_timesteps"):
            raise InvalidRequest(
                "checkpoint: expected Wan 2.1 or Wan 2.2 A14B, got expand_timesteps in model_index.json: Wan "
                "2.2 TI2V is not supported"
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
        table = (self.tokens(workload), self.integer("attention_head_dim") // 2)
        return (
            TensorSpec("latents", workload.dtype, (ROWS, channels, *latents)),
            *self._image_tensors(workload),
            TensorSpec("hidden_states", workload.dtype, (ROWS, *self.grid(workload), self.width)),
            TensorSpec("modulation", "float32", (ROWS, 6, self.width)),
            TensorSpec("temb", "float32", (ROWS, self.width)),
            TensorSpec("rope_cos", "float32", table),
            TensorSpec("rope_sin", "float32", table),
            TensorSpec("pred", workload.dtype, (ROWS, channels, *latents)),
        )

    def _image_tensors(self, workload: Workload) -> list[TensorSpec]:
        """Of the channels beside the latents, and of the tokens beside the text."""
        found = []
        if self.front_constants:
            _, *latents = self.latent_shape(workload)
            channels = self.integer("in_channels") - self.latent_channels
            found.append(TensorSpec(CONDITION, workload.dtype, (ROWS, channels, *latents)))
        if self.sees:
            shape = (ROWS, self.context_tokens, self.integer("image_dim"))
            found.append(TensorSpec(IMAGE_EMBEDS, workload.dtype, shape))
            found.append(TensorSpec(_IMAGE, workload.dtype, (*shape[:2], self.width)))
        return found

    def text_borders(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (("prompt_embeds", IMAGE_EMBEDS), ("text", _IMAGE)) if self.sees else super().text_borders()

    def text_module(self, transformer: Any, *borders: Any) -> SegmentModule:
        return WanText(transformer.condition_embedder, *borders)

    def context_flops(self) -> int:
        seen = self.integer("image_dim") if self.sees else 0
        return 2 * self.context_tokens * seen * (seen + self.width)

    def encode_images(
        self, pipeline: Any, images: Images, workload: Workload, videos: int, generator: Any
    ) -> ImageCondition:
        """The most likely latents of the video around the pictures; nothing is drawn."""
        sets = [images.image, images.last_image] if images.last_image else [images.image]
        pixels = [pipeline.video_processor.preprocess([*s], workload.height, workload.width) for s in sets]
        temporal, _ = self.compression
        # Of each video's pictures, from stacks of first and last ones.
        videos_pictures = [[*pictures] for pictures in zip(*pixels, strict=True)]
        channels = torch.cat([given_frames(pipeline.vae, one, workload, temporal) for one in videos_pictures])
        context = None
        if self.sees:
            device = pipeline.image_encoder.device
            seen = [pipeline.encode_image([*pictures], device) for pictures in zip(*sets, strict=True)]
            context = torch.stack([tokens.flatten(0, 1) for tokens in seen])
        return ImageCondition(
            channels.expand(videos, *channels.shape[1:]),
            None if context is None else context.expand(videos, *context.shape[1:]),
        )

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

    def decode(self, pipeline: Any, latents: Tensor, workload: Workload, **options: Any) -> Tensor:
        vae = pipeline.vae
        mean, std = latent_statistics(vae, latents.device)
        return vae_video(vae, (latents * std + mean).to(vae.dtype))

    def _check_channels(self) -> None:
        """Refuses Wan 2.2 TI2V, which has the same class, and a VAE of other channels."""
        channels, vae = self.latent_channels, self.vae_config or {}
        with_image = 2 * channels + self.compression[0]
        if self.integer("in_channels") not in (channels, with_image):
            raise InvalidRequest(
                f"checkpoint: expected in_channels {channels} in transformer/config.json, as out_channels, "
                f"or {with_image} for image-to-video, got {self.config['in_channels']}: download it again"
            )
        if self.sees and not self.front_constants:
            raise InvalidRequest(
                "checkpoint: expected image_dim in transformer/config.json of image-to-video, and only "
                f"there, got {self.config['image_dim']}: download it again"
            )
        if vae.get("is_residual") or vae.get("patch_size"):
            raise InvalidRequest(
                "checkpoint: expected the VAE of Wan 2.1, got one with is_residual or patch_size in "
                "vae/config.json: Wan 2.2 TI2V is not supported, use Wan 2.1 or Wan 2.2 A14B"
            )
        if vae.get("z_dim", channels) != channels:
            raise InvalidRequest(
                f"checkpoint: expected z_dim {channels} in vae/config.json, as the transformer's "
                f"out_channels, got {vae['z_dim']}: the folder mixes two models, download it again"
            )
