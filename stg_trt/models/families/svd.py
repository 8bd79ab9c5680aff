"""Stable Video Diffusion, svd and svd-xt: a UNet that animates a picture, without a prompt.

Reproduces diffusers' StableVideoDiffusionPipeline, whose latents have frames before channels. The picture is
latents beside those of the noise in every frame, and a token of CLIP; the unconditional pass sees neither.
Perturbable are the self-attentions, numbered in running order: 2i is the spatial, 2i+1 the temporal one of
attention module i. stg-r makes one return its normed input, as the code of STG's authors does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.config_file import positive_integer
from stg_trt.models.defaults import Defaults
from stg_trt.models.families.unet import SpatioTemporalUNet
from stg_trt.models.families.unet_segment import FPS, MOTION
from stg_trt.models.image import ImageCondition, ImageOptions, Images, Places
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload

# Of the published VAE: each level but the first halves height and width.
_VAE_CHANNELS = (128, 256, 512, 512)
_CLIP_SIZE = (224, 224)
_MOTION_BUCKET, _NOISE_AUG_STRENGTH = 127.0, 0.02


class SVD(SpatioTemporalUNet):
    """Stable Video Diffusion as diffusers has it (Stability AI, arXiv 2311.15127)."""

    name = "svd"
    export_version = 1
    pipeline_class = "StableVideoDiffusionPipeline"
    has_text_segment = False
    reads_text = False
    takes_lora = False
    decode_options = frozenset({"decode_chunk_size"})
    image_options = frozenset({"image_embeddings", "image_latents", "motion_bucket_id", "noise_aug_strength"})

    def __init__(self, *configs: Any) -> None:
        super().__init__(*configs)
        self._check_config()
        # The first attention module of the decoder.
        first = self.unet.first_decoder_block
        self.defaults = Defaults(
            stg_mode="stg-a",
            stg_blocks={"spatial": (first,), "temporal": (first + 1,)},
            stg_scale=1.0,
            guidance_scale=3.0,
            rescale=0.0,
            num_inference_steps=25,
            frame_rate=7.0,
            text_length=0,
            min_guidance_scale=1.0,
        )

    @property
    def needed_images(self) -> tuple[str, ...]:
        return ("image",)

    @property
    def image_parts(self) -> tuple[str, ...]:
        return "image_encoder", "feature_extractor"

    def latent_shape(self, workload: Workload) -> tuple[int, int, int, int]:
        factor = self._vae_factor
        size = workload.height // factor, workload.width // factor
        return self.integer("out_channels"), workload.num_frames, *size

    def check(self, workload: Workload) -> None:
        for side in ("height", "width"):
            pixels, multiple = getattr(workload, side), self._vae_factor
            if pixels <= 0 or pixels % multiple:
                raise InvalidRequest(
                    f"{side}: expected a positive multiple of {multiple}, got {pixels}: "
                    f"use {max(multiple, round(pixels / multiple) * multiple)}"
                )
        if workload.num_frames < 1:
            raise InvalidRequest(
                f"num_frames: expected at least 1, got {workload.num_frames}: use {self.config['num_frames']}"
            )
        if workload.text_length:
            raise InvalidRequest(
                f"text_length: expected 0 for {self.name}, which reads no text, got {workload.text_length}: "
                "leave it out"
            )

    def position_tables(
        self, workload: Workload, frame_rate: float, placed: Places = ()
    ) -> dict[str, Tensor]:
        """The frames per second, less one as the model was trained."""
        return {FPS: torch.tensor([frame_rate - 1])}

    def text_inputs(self, text: TextCondition, workload: Workload) -> dict[str, Tensor]:
        """None."""
        return {}

    def image_inputs(self, image: ImageCondition) -> dict[str, Tensor]:
        assert image.scalars is not None
        return super().image_inputs(image) | {MOTION: image.scalars}

    def uncond_image(self, image: ImageCondition) -> ImageCondition:
        """Zeros for the picture, and the same scalars."""
        assert image.channels is not None and image.context is not None
        unseen = torch.zeros_like(image.channels), torch.zeros_like(image.context)
        return ImageCondition(*unseen, image.scalars)

    def random_text(self, workload: Workload, rows: int, generator: torch.Generator) -> TextCondition:
        return TextCondition.none(rows)

    def random_image(self, workload: Workload, rows: int, generator: torch.Generator) -> ImageCondition:
        image = super().random_image(workload, rows, generator)
        assert image is not None and image.context is not None
        return replace(image, scalars=_scalars(ImageOptions(), rows))

    def encode_prompt(self, pipeline: Any, prompts: list[str], workload: Workload) -> TextCondition:
        raise TypeError("SVD reads no prompt")

    def encode_images(
        self, pipeline: Any, images: Images, workload: Workload, videos: int, generator: Any
    ) -> ImageCondition:
        """The pictures' tokens, and the latents of the pictures with noise, drawn once per picture."""
        from diffusers.utils.torch_utils import randn_tensor

        pictures, vae = [*images.distinct], pipeline.vae
        token = pipeline._encode_image(_clip_pixels(pipeline, pictures), vae.device, 1, False)
        pixels = pipeline.video_processor.preprocess(pictures, workload.height, workload.width)
        noise = randn_tensor(pixels.shape, generator=generator, dtype=pixels.dtype)
        noisy = pixels + _noise_strength(images.options) * noise
        with _upcast(vae):
            latents = pipeline._encode_vae_image(noisy, vae.device, 1, False)
        return self._condition(token, latents, images.options, workload, videos)

    def given_images(self, images: Images, workload: Workload, videos: int) -> ImageCondition:
        options = images.options
        tokens, latents = options.image_embeddings, options.image_latents
        assert tokens is not None and latents is not None
        channels, _, *size = self.latent_shape(workload)
        wanted = {
            "image_embeddings": (tokens, (1, self.integer("cross_attention_dim"))),
            "image_latents": (latents, (channels, *size)),
        }
        for name, (tensor, shape) in wanted.items():
            if tuple(tensor.shape[1:]) != shape or len(tensor) not in (1, len(tokens)):
                raise InvalidRequest(
                    f"{name}: expected {(len(tokens), *shape)} for {workload}, got {tuple(tensor.shape)}: "
                    "give those of this model's own encoder"
                )
            if not tensor.isfinite().all():
                raise InvalidRequest(
                    f"{name}: expected finite numbers, got NaN or infinity: check their source"
                )
        return self._condition(tokens, latents, options, workload, videos)

    def check_decode_options(self, options: Mapping[str, Any]) -> None:
        chunk = options.get("decode_chunk_size")
        if chunk is not None and (type(chunk) is not int or chunk < 1):
            raise InvalidRequest(
                f"decode_chunk_size: expected a positive number of frames, got {chunk}: leave it out"
            )

    def vae_latents(self, pipeline: Any, latents: Tensor, workload: Workload) -> Tensor:
        scaled: Tensor = latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor
        return scaled.transpose(1, 2)

    def decode(
        self,
        pipeline: Any,
        latents: Tensor,
        workload: Workload,
        decode_chunk_size: int | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """A number of frames at a time; all of them by default, as diffusers does."""
        frames = workload.num_frames
        chunk = frames if decode_chunk_size is None else decode_chunk_size
        # No chunk has frames of two videos.
        for video in latents.to(pipeline.vae.dtype).split(1):
            with torch.no_grad():
                decoded = pipeline.decode_latents(video, frames, chunk)
            yield decoded

    @property
    def _vae_factor(self) -> int:
        channels: Sequence[int] = (self.vae_config or {}).get("block_out_channels", _VAE_CHANNELS)
        factor: int = 2 ** (len(channels) - 1)
        return factor

    def _condition(
        self, token: Tensor, latents: Tensor, options: ImageOptions, workload: Workload, videos: int
    ) -> ImageCondition:
        """The picture's token and latents of every video, the latents in every frame."""
        times = videos // len(token)
        channels = latents.repeat_interleave(videos // len(latents), 0)[:, None]
        channels = channels.expand(-1, workload.num_frames, -1, -1, -1)
        return ImageCondition(channels, token.repeat_interleave(times, 0), _scalars(options, videos))

    def _check_config(self) -> None:
        """Raises InvalidRequest for what no published model has."""
        latents = self.integer("out_channels")
        deep = self.config.get("transformer_layers_per_block", 1)
        wrong = (
            ("in_channels", self.integer("in_channels"), 2 * latents),
            ("transformer_layers_per_block", deep, 1),
        )
        for name, got, expected in wrong:
            if got != expected:
                raise InvalidRequest(
                    f"checkpoint: expected {name} {expected} in {self.config_file}, as in every published "
                    f"model, got {got}: use a checkpoint of Stable Video Diffusion"
                )
        positive_integer(self.config["layers_per_block"], "layers_per_block", self.config_file)


def _noise_strength(options: ImageOptions) -> float:
    given = options.noise_aug_strength
    return _NOISE_AUG_STRENGTH if given is None else float(given)


def _scalars(options: ImageOptions, videos: int) -> Tensor:
    """The motion bucket and the strength of the noise, for every video."""
    bucket = _MOTION_BUCKET if options.motion_bucket_id is None else float(options.motion_bucket_id)
    return torch.tensor([[bucket, _noise_strength(options)]]).repeat(videos, 1)


def _clip_pixels(pipeline: Any, pictures: Sequence[Any]) -> Tensor:
    """Pictures of CLIP's size in 0..1, resized as diffusers resizes PIL images, and others alike."""
    from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
        _resize_with_antialiasing,
    )

    processor = pipeline.video_processor
    resized = []
    for picture in pictures:
        if not isinstance(picture, Tensor):
            arrays = picture[None] if hasattr(picture, "shape") else processor.pil_to_numpy(picture)
            picture = processor.numpy_to_pt(arrays)
        pixels = picture.reshape(1, *picture.shape[-3:]) * 2 - 1
        resized.append((_resize_with_antialiasing(pixels, _CLIP_SIZE) + 1) / 2)
    return torch.cat(resized)


@contextmanager
def _upcast(vae: Any) -> Iterator[None]:
    """In float32 if the VAE's configuration asks for it in float16."""
    lowered = vae.dtype == torch.float16 and vae.config.force_upcast
    if lowered:
        vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        if lowered:
            vae.to(dtype=torch.float16)
