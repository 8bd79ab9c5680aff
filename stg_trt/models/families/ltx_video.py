"""LTX-Video 2B and 13B: a DiT with self-attention, cross-attention and feed-forward in every block.

Reproduces diffusers' LTXVideoTransformer3DModel; LTXPipeline and, with a picture, LTXImageToVideoPipeline;
LTXConditionPipeline for checkpoints that name it (0.9.7 and later). These cross a cut: the hidden states, the
timestep modulation `temb`, and the embedded timestep that the head reads. Constant over the steps: the
projected text, its mask, the RoPE tables, and each token's place among a row's timesteps.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.custom_steps import CustomSteps
from stg_trt.models.defaults import Defaults
from stg_trt.models.families.base import load_class, vae_videos
from stg_trt.models.families.clean_frames import Encoder, extra_frames, first_frame, frame_conditions
from stg_trt.models.families.cross_attention import CrossAttentionDiT, CrossAttentionSegment
from stg_trt.models.families.decode_timestep import add_decode_noise
from stg_trt.models.families.dit import State, TextProjection, half_table, rms_norm, rotate
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.families.token_shift import TokenShift, set_even_sigmas
from stg_trt.models.families.token_timesteps import (
    TIMESTEP_INDEX,
    TIMESTEP_LIMITS,
    of_tokens,
    timestep_tables,
    token_timestep_specs,
    token_timesteps,
)
from stg_trt.models.image import CleanLatents, ImageCondition, Images, Places
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload

_CONDITION_OPTIONS = frozenset({"image_cond_noise_scale", "video", "frame_index", "strength"})
_IMAGE_PIPELINE, _CONDITION_PIPELINE = "LTXImageToVideoPipeline", "LTXConditionPipeline"
_SHIFT = TokenShift(256, 4096, 0.5, 1.15)
# Lightricks' configs/ltxv-13b-0.9.8-distilled.yaml, first_pass, in training steps.
_DISTILLED = CustomSteps("timesteps", (1000.0, 993.7, 987.5, 981.2, 975.0, 909.4, 725.0))


class LTXSegment(CrossAttentionSegment):
    """LTXVideoTransformerBlocks; residuals in the compute dtype, modulation in float32."""

    def take_embedding(self, transformer: Any) -> None:
        self.proj_in, self.time_embed = transformer.proj_in, transformer.time_embed

    def take_head(self, transformer: Any) -> None:
        self.scale_shift_table = transformer.scale_shift_table
        self.norm_out, self.proj_out = transformer.norm_out, transformer.proj_out

    def latent_grid(self, latents: Tensor) -> tuple[int, ...]:
        """Latents are tokens already, (rows, tokens, channels)."""
        return tuple(latents.shape[1:-1])

    def embed(self, state: State) -> State:
        timesteps = token_timesteps(state)
        temb, embedded = self.time_embed(timesteps.flatten(), hidden_dtype=torch.float32)
        return {
            "hidden_states": self.proj_in(state["latents"]),
            "temb": temb.view(*timesteps.shape, 6, -1),
            "embedded_timestep": embedded.unflatten(0, timesteps.shape),
        }

    def block(self, block: Any, state: State, perturbed: bool) -> State:
        hidden = state["hidden_states"]
        dtype = hidden.dtype
        modulation: Tensor = block.scale_shift_table + state["temb"]
        shift, scale, gate, shift_ff, scale_ff, gate_ff = of_tokens(modulation.unbind(dim=2), state)
        normed = (rms_norm(block.norm1, hidden) * (1 + scale) + shift).to(dtype)
        attended = self.self_attention(block.attn1, normed, state, perturbed)
        hidden = hidden + (attended.float() * gate).to(dtype)
        hidden = hidden + self.cross_attention(block.attn2, hidden, state["text"], state["text_bias"])
        normed = (rms_norm(block.norm2, hidden) * (1 + scale_ff) + shift_ff).to(dtype)
        return {"hidden_states": hidden + (block.ff(normed).float() * gate_ff).to(dtype)}

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        return rotate(x, cos, sin, dtype)

    def head(self, state: State) -> Tensor:
        hidden = state["hidden_states"]
        modulation = state["embedded_timestep"].unsqueeze(2) + self.scale_shift_table
        shift, scale = of_tokens(modulation.unbind(dim=2), state)
        normed = self.norm_out(hidden.float()) * (1 + scale) + shift
        pred: Tensor = self.proj_out(normed.to(hidden.dtype))
        return pred


class LTXVideo(CrossAttentionDiT):
    """LTX-Video as diffusers has it (Lightricks, arXiv 2501.00103)."""

    name = "ltx-video"
    transformer_class = "LTXVideoTransformer3DModel"
    export_version = 4
    pipeline_class = "LTXPipeline"
    decode_options = frozenset({"decode_timestep", "decode_noise_scale"})
    blocks_name = "transformer_blocks"
    modulation = "temb"
    head_modulation = "embedded_timestep"
    block_constants = ("text", "text_bias", "rope_cos", "rope_sin", TIMESTEP_INDEX)
    front_constants = (TIMESTEP_LIMITS,)
    head_constants = (TIMESTEP_INDEX,)
    optional_images = ("image",)
    # The step's, and one for each strength of a condition.
    timestep_places = 4
    # Timestep MLP, modulation tables and norms, which are applied in float32.
    float32_islands = r"time_embed\.|scale_shift_table|norm"
    segment_class = LTXSegment
    # Every published model has these.
    patch = (1, 1, 1)
    timestep_channels = 256
    defaults = Defaults(
        stg_mode="stg-a",
        stg_blocks=(19,),
        stg_scale=1.0,
        guidance_scale=3.0,
        rescale=0.7,
        num_inference_steps=40,
        frame_rate=25.0,
        text_length=128,
    )

    def __init__(self, *configs: Any) -> None:
        super().__init__(*configs)
        # That pipeline has other positions in time and other sigmas, and masks its text encoder's padding.
        self._conditioned = self.model_index.get("_class_name") == _CONDITION_PIPELINE
        self.takes_conditions = self.draws_noise_first = self._conditioned
        self.image_options = _CONDITION_OPTIONS if self._conditioned else frozenset()
        self.starts_from_given_latents = not self._conditioned
        if self._conditioned:
            self.pipeline_class = _CONDITION_PIPELINE
        if "distilled" in self.origin.lower():
            self.defaults = self._distilled_defaults()

    def _distilled_defaults(self) -> Defaults:
        """No guidance: the published steps of 0.9.7 and later, which have that pipeline; 8 steps of 0.9.6."""
        off = replace(self.defaults, guidance_scale=1.0, stg_scale=0.0, rescale=0.0, num_inference_steps=8)
        if not self._conditioned:
            return off
        return replace(off, num_inference_steps=len(_DISTILLED.values), steps=_DISTILLED)

    @property
    def feed_forward_width(self) -> int:
        return 4 * self.width

    @property
    def text_channels(self) -> int:
        return self.integer("caption_channels")

    @property
    def compression(self) -> tuple[int, int]:
        """Pixels per latent in time and in space, from the VAE's configuration or the published VAE's."""
        if self.vae_config is None:
            return 8, 32
        vae, halvings = self.vae_config, sum(self.vae_config["spatio_temporal_scaling"])
        temporal = vae.get("temporal_compression_ratio") or vae["patch_size_t"] * 2**halvings
        return temporal, vae.get("spatial_compression_ratio") or vae["patch_size"] * 2**halvings

    def check(self, workload: Workload) -> None:
        for name in ("patch_size", "patch_size_t"):
            if self.integer(name) != 1:
                raise InvalidRequest(
                    f"checkpoint: expected {name} 1 in transformer/config.json, as in every published "
                    f"LTX-Video, got {self.config[name]}: use a checkpoint without patches"
                )
        super().check(workload)
        if workload.condition_frames and not self._conditioned:
            raise InvalidRequest(
                f"condition_frames: expected 0 for {self.pipeline_class}, which takes a picture for the "
                f"first frame alone, got {workload.condition_frames}: leave it out"
            )

    def own_tensors(self, workload: Workload) -> tuple[TensorSpec, ...]:
        tokens, width, dtype = self.tokens(workload), self.width, workload.dtype
        return (
            TensorSpec("latents", dtype, (ROWS, tokens, self.integer("in_channels"))),
            TensorSpec("hidden_states", dtype, (ROWS, tokens, width)),
            TensorSpec("temb", "float32", (ROWS, self.timestep_places, 6, width)),
            TensorSpec("embedded_timestep", "float32", (ROWS, self.timestep_places, width)),
            *token_timestep_specs(tokens, self.timestep_places),
            TensorSpec("text_bias", dtype, (ROWS, 1, 1, workload.text_length)),
            TensorSpec("rope_cos", "float32", (tokens, width // 2)),
            TensorSpec("rope_sin", "float32", (tokens, width // 2)),
            TensorSpec("pred", dtype, (ROWS, tokens, self.integer("out_channels"))),
        )

    def text_module(self, transformer: Any, *borders: Any) -> SegmentModule:
        return TextProjection(transformer.caption_projection, *borders)

    def position_tables(
        self, workload: Workload, frame_rate: float, placed: Places = ()
    ) -> dict[str, Tensor]:
        from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed

        rope = LTXVideoRotaryPosEmbed(
            dim=self.width,
            base_num_frames=20,
            base_height=2048,
            base_width=2048,
            theta=10000.0,
        )
        cos, sin = rope(torch.zeros(1, 1), **self._positions(workload, frame_rate, placed))
        return {"rope_cos": half_table(cos[0]), "rope_sin": half_table(sin[0])}

    def timestep_tables(self, workload: Workload, image: ImageCondition | None) -> dict[str, Tensor]:
        clean = None if image is None else image.clean
        strengths = torch.zeros(self.tokens(workload)) if clean is None else clean.strength.flatten()
        return timestep_tables(strengths, self.timestep_places)

    def tokens(self, workload: Workload) -> int:
        """Those of the video, and of pictures for later frames."""
        _, height, width = self.grid(workload)
        return super().tokens(workload) + workload.condition_frames * height * width

    def condition_frames(self, images: Images, workload: Workload) -> int:
        temporal, _ = self.compression
        return sum(extra_frames(one, workload.num_frames, temporal) for one in images.conditions)

    def random_image(self, workload: Workload, rows: int, generator: torch.Generator) -> ImageCondition:
        """The first frame and all tokens before it clean, so that both kinds of timesteps are compared."""
        frames, height, width = self.grid(workload)
        before, spatial = workload.condition_frames, height * width
        strength = torch.zeros(before + frames, spatial, 1)
        strength[: before + 1] = 1
        placed = ((workload.num_frames - 1, 1),) * before
        return ImageCondition(clean=CleanLatents(strength.flatten(0, 1)), placed=placed)

    def finished(self, latents: Tensor, workload: Workload, image: ImageCondition | None) -> Tensor:
        """Without the tokens before the video's."""
        return latents[:, -super().tokens(workload) :]

    def returned(self, latents: Tensor, workload: Workload) -> Tensor:
        """LTXConditionPipeline returns them unpacked."""
        if not self._conditioned:
            return latents
        unpacked: Tensor = load_class(_CONDITION_PIPELINE)._unpack_latents(
            latents, *self.latent_shape(workload)[1:]
        )
        return unpacked

    def encode_images(
        self, pipeline: Any, images: Images, workload: Workload, videos: int, generator: Any
    ) -> ImageCondition:
        """The pictures' latents, in the place of noise."""
        encoder = Encoder(pipeline, load_class(_IMAGE_PIPELINE), workload, videos, generator)
        temporal, _ = self.compression
        if self._conditioned:
            return frame_conditions(encoder, images, self.latent_shape(workload), temporal)
        return first_frame(encoder, encoder.pixels(images.image), self.latent_shape(workload))

    def text_inputs(self, text: TextCondition, workload: Workload) -> dict[str, Tensor]:
        bias = (1 - text.mask.float()) * -10000.0
        return {"prompt_embeds": text.embeds, "text_bias": bias[:, None, None, :]}

    def _positions(self, workload: Workload, frame_rate: float, placed: Places) -> dict[str, Any]:
        """The tokens' places, in seconds and pixels, as the pipeline gives them to RoPE."""
        temporal, spatial = self.compression
        _, frames, height, width = self.latent_shape(workload)
        if not self._conditioned:
            scale = (temporal / frame_rate, spatial, spatial)
            return {
                "num_frames": frames,
                "height": height,
                "width": width,
                "rope_interpolation_scale": scale,
            }
        # The VAE is causal: the first latent is one frame, and each of the others `temporal` of them.
        pipeline = load_class(self.pipeline_class)
        places = torch.cat([
            pipeline._scale_video_ids(
                pipeline._prepare_video_ids(1, latents, height, width), spatial, temporal, first
            )
            for first, latents in (*placed, (0, frames))
        ], 2).float()  # fmt: skip
        places[:, 0] *= 1.0 / frame_rate
        return {"video_coords": places}

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, workload: Workload) -> None:
        from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

        if not self._conditioned:
            set_even_sigmas(scheduler, num_inference_steps, self.shift(scheduler, workload))
        elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
            sigmas = linear_quadratic_schedule(num_inference_steps).numpy()
            own = {"timesteps": 1000 * sigmas} if self.steps_per_token(scheduler) else {}
            # The sigmas are those that the scheduler makes of the timesteps; given too, it does not warn.
            scheduler.set_timesteps(sigmas=sigmas, **own)
        else:
            # The pipeline's own timesteps need these; any other scheduler makes its own.
            scheduler.set_timesteps(num_inference_steps)

    def takes_timesteps(self, scheduler: Any) -> bool:
        return self.steps_per_token(scheduler)

    def steps_per_token(self, scheduler: Any) -> bool:
        # LTXConditionPipeline runs with no other scheduler; one without it keeps to its own sigmas.
        return self._conditioned and "per_token_timesteps" in inspect.signature(scheduler.step).parameters

    def shift(self, scheduler: Any, workload: Workload) -> dict[str, float]:
        return {} if self._conditioned else _SHIFT.of(scheduler, self.tokens(workload))

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

    def vae_latents(self, pipeline: Any, latents: Tensor, workload: Workload) -> Tensor:
        vae, (_, *grid) = pipeline.vae, self.latent_shape(workload)
        denormalized: Tensor = pipeline._denormalize_latents(
            pipeline._unpack_latents(latents, *grid),
            vae.latents_mean,
            vae.latents_std,
            vae.config.scaling_factor,
        )
        return denormalized.to(vae.dtype)

    def decode(self, pipeline: Any, latents: Tensor, workload: Workload, **options: Any) -> Iterator[Tensor]:
        """`decode_timestep` and `decode_noise_scale` are LTXPipeline's: one number, or one per video."""
        vae, latents = pipeline.vae, self.vae_latents(pipeline, latents, workload)
        if not vae.config.timestep_conditioning:
            return vae_videos(vae, latents)
        return vae_videos(vae, *add_decode_noise(latents, options))
