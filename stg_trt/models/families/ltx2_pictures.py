"""A picture as the first frame of LTX-2: compressed as a video is, encoded, and kept clean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.families.base import load_class
from stg_trt.models.families.clean_frames import Encoder, first_frame
from stg_trt.models.image import ImageCondition, Images
from stg_trt.models.workload import Workload

IMAGE_OPTIONS = frozenset({"image_crf"})
_PIPELINE = "LTX2ImageToVideoPipeline"
# The model has learnt from frames of videos, so Lightricks' code and diffusers' compress a picture likewise.
_CRF = 33
_MOST_CRF = 51


def encode_picture(
    pipeline: Any, images: Images, workload: Workload, shape: Sequence[int], videos: int
) -> ImageCondition:
    """The pictures as the first frames of latents (channels, frames, height, width).

    As LTX2ImageToVideoPipeline encodes them: the mean of the VAE's posterior. Raises InvalidRequest for an
    `image_crf` that H.264 does not have, and for floating-point pictures, which it cannot compress.
    """
    encoder = Encoder(pipeline, load_class(_PIPELINE), workload, videos, generator=None, draws=False)
    crf = _checked(images.options.image_crf)
    return first_frame(
        encoder, _pixels(pipeline, [_compressed(one, crf) for one in images.image], workload), shape
    )


def _pixels(pipeline: Any, pictures: list[Any], workload: Workload) -> Tensor:
    from diffusers.video_processor import VideoProcessor

    factor = pipeline.vae_spatial_compression_ratio
    # Not LTX2Pipeline's own, which resizes by another filter.
    processor = VideoProcessor(vae_scale_factor=factor, resample="bilinear")
    pixels: Tensor = processor.preprocess(pictures, workload.height, workload.width)
    return pixels


def _checked(crf: object) -> int:
    if crf is None:
        return _CRF
    if type(crf) is not int or not 0 <= crf <= _MOST_CRF:
        raise InvalidRequest(
            f"image_crf: expected a whole number from 0 to {_MOST_CRF}, got {crf!r}: use {_CRF}, or 0 to "
            "keep the picture as it is"
        )
    return crf


def _compressed(picture: Any, crf: int) -> Any:
    """A picture after H.264; 0 leaves it as it is."""
    from diffusers.pipelines.ltx2.utils import apply_image_conditioning_crf

    if crf == 0:
        return picture
    if not isinstance(picture, Image.Image):
        raise InvalidRequest(
            "image: expected a path, a PIL image or an array of uint8, which H.264 compresses as the model "
            f"has learnt, got {type(picture).__name__} of {picture.dtype}: convert it, or pass image_crf=0"
        )
    return Image.fromarray(apply_image_conditioning_crf(np.asarray(picture), crf))
