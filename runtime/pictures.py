"""The pictures of a call: paths, PIL images, arrays and tensors, checked against what the model takes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.image import FrameCondition, ImageOptions, Images

from .prompts import Prompts
from .video_file import read_video

Picture = str | Path | Image.Image | np.ndarray[Any, Any] | Tensor
Pictures = Picture | Sequence[Picture]

# The default of diffusers' pipeline.
_IMAGE_COND_NOISE = 0.15
_ENTRIES = {"image", "video", "frame_index", "strength"}


@dataclass(frozen=True)
class GivenPictures:
    """The pictures of a call, as it gave them.

    `conditions` are diffusers' objects or mappings with image or video, frame_index and strength.
    """

    image: Pictures | None = None
    last_image: Pictures | None = None
    conditions: Sequence[object] | object = None
    options: ImageOptions = field(default_factory=ImageOptions)

    @property
    def count(self) -> int:
        """How many pictures a call is about, of which it has one or what was made of it."""
        if self.options.image_embeddings is not None:
            return len(self.options.image_embeddings)
        return len(self.image) if _is_batch(self.image) else 1

    def read(self, family: ModelFamily, prompts: Prompts) -> Images | None:
        """The pictures by their argument's name, one for all videos or one for each; None for text-to-video.

        One prompt's are those of its videos. Raises InvalidRequest for pictures that the model has no use
        for, for one that it lacks, and for what is not a picture.
        """
        named = {"image": self.image, "last_image": self.last_image}
        given = {name: value for name, value in named.items() if value is not None}
        if self.options.image_latents is not None or self.options.image_embeddings is not None:
            _check_given(family, given, self.options)
            return Images(options=self.options)
        _check_names(family, given)
        if family.takes_conditions:
            return self._conditions()
        if self.conditions is not None:
            raise InvalidRequest(
                f"conditions: expected none for this {family.name} checkpoint, whose pipeline is "
                f"{family.pipeline_class}, got some: use one whose pipeline has it"
            )
        if not given:
            _check_beside_nothing(self.options)
            return None
        read = {name: _read(name, value, prompts.count) for name, value in given.items()}
        each = 1
        if any(len(found) > 1 for found in read.values()):
            read = {name: _of_videos(found, prompts) for name, found in read.items()}
            each = prompts.videos_per_prompt
        image, last_image = read.get("image", ()), read.get("last_image", ())
        return Images(image, last_image, options=self.options, each=each)

    def _conditions(self) -> Images | None:
        """Those of `conditions`, or of the short form."""
        given = self.conditions if isinstance(self.conditions, list | tuple) else [self.conditions]
        found = [_condition(one) for one in given if one is not None]
        short = _short_form(self.image, self.options)
        if found and short:
            raise InvalidRequest(
                "conditions: expected image or conditions, got both: add the image to the conditions"
            )
        if not found and not short:
            return None
        scale = self.options.image_cond_noise_scale
        return Images(conditions=found or short, noise_scale=_IMAGE_COND_NOISE if scale is None else scale)


def _check_names(family: ModelFamily, given: Mapping[str, Pictures]) -> None:
    for name in given:
        if name not in (*family.needed_images, *family.optional_images):
            raise InvalidRequest(
                f"{name}: expected none, for which this {family.name} checkpoint was not trained, got a "
                "picture: leave it out, or use a checkpoint for it"
            )
    for name in family.needed_images:
        if name not in given:
            raise InvalidRequest(
                f"{name}: expected a picture, from which this {family.name} checkpoint makes its video, got "
                f"none: give {name}"
            )


def _condition(given: Any) -> FrameCondition:
    """One entry of `conditions`."""
    if isinstance(given, FrameCondition):
        return given
    entries = dict(given) if isinstance(given, Mapping) else getattr(given, "__dict__", {})
    unknown = entries.keys() - _ENTRIES
    pictures = [entries[name] for name in ("image", "video") if entries.get(name) is not None]
    if unknown or len(pictures) != 1:
        raise InvalidRequest(
            f"conditions: expected an image or a video with frame_index and strength, got "
            f"{', '.join(entries) or type(given).__name__}: write them as diffusers' or as a mapping"
        )
    if entries.get("image") is not None:
        shown = [_picture("conditions", pictures[0])]
    else:
        shown = _video("conditions", pictures[0])
    return FrameCondition(shown, entries.get("frame_index", 0), entries.get("strength", 1.0))


def _short_form(image: Pictures | None, options: ImageOptions) -> list[FrameCondition]:
    """Conditions of `image` and `video`, one or a list each, with a frame and a strength each or for all."""
    if image is None and options.video is None:
        _check_beside_nothing(options)
        return []
    pairs = _pairs(_listed(image), _listed_videos(options.video))
    pictures = [_read("image", one, 1) if other is None else _video("video", other) for one, other in pairs]
    frames = _for_each("frame_index", options.frame_index, 0, len(pairs))
    strengths = _for_each("strength", options.strength, 1.0, len(pairs))
    return [FrameCondition(*one) for one in zip(pictures, frames, strengths, strict=True)]


def _check_beside_nothing(options: ImageOptions) -> None:
    if "image_crf" in options.given:
        raise InvalidRequest("image_crf: expected it beside image, got it without: add the picture")
    for name in ("frame_index", "strength"):
        if name in options.given:
            raise InvalidRequest(
                f"{name}: expected it beside image or video, got it without: add them, or write it into the "
                "conditions"
            )


def _pairs(images: list[Any], videos: list[Any]) -> list[tuple[Any, Any]]:
    """Either an image or a video for each condition; the other is None."""
    count = max(len(images), len(videos))
    pairs = [*zip(images or [None] * count, videos or [None] * count, strict=False)]
    if not count or len(pairs) != count or any((one is None) == (other is None) for one, other in pairs):
        raise InvalidRequest(
            f"image: expected an image or a video for each condition, got {len(images)} images and "
            f"{len(videos)} videos: write None in one list where the other has its entry"
        )
    return pairs


def _listed(value: Any) -> list[Any]:
    """The entries of a list, or the one that there is."""
    if value is None:
        return []
    return [*value] if isinstance(value, list | tuple) else [value]


def _listed_videos(value: Any) -> list[Any]:
    """As for pictures, but a list of pictures is one video."""
    several = _listed(value)
    is_frames = any(isinstance(one, Image.Image) or getattr(one, "ndim", 0) == 3 for one in several)
    return [value] if is_frames else several


def _for_each(name: str, value: Any, default: float, count: int) -> list[Any]:
    """A value for each of the conditions, of as many or of one for all."""
    values = _listed(default if value is None else value)
    if not isinstance(value, list | tuple):
        values *= count
    if len(values) != count:
        raise InvalidRequest(
            f"{name}: expected one number or {count}, got {len(values)}: give one per image or video"
        )
    return values


def _video(name: str, value: Any) -> list[Any]:
    """The frames of a file, or of a sequence, an array or a tensor of pictures."""
    if isinstance(value, str | Path):
        return read_video(name, Path(value))
    several = isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 4
    if not several or not len(value):
        raise InvalidRequest(
            f"{name}: expected a video as a path or a sequence of pictures, got {type(value).__name__}: "
            "give its frames"
        )
    return [_picture(name, frame) for frame in value]


def _is_batch(value: Pictures | None) -> TypeGuard[Sequence[Picture]]:
    """Whether an argument has several pictures."""
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 4)


def _check_given(family: ModelFamily, given: Mapping[str, Pictures], options: ImageOptions) -> None:
    """Raises InvalidRequest for one of embeddings and latents without the other, or beside a picture."""
    if given:
        raise InvalidRequest(
            f"{next(iter(given))}: expected a picture, or image_embeddings and image_latents, got both: give "
            "one of them"
        )
    for name in ("image_embeddings", "image_latents"):
        if getattr(options, name) is None:
            raise InvalidRequest(
                f"{name}: expected it beside what else the {family.name} checkpoint makes of a picture, got "
                "none: give both, or the picture"
            )


def _of_videos(found: list[Any], prompts: Prompts) -> list[Any]:
    of_prompts = found * prompts.count if len(found) == 1 else found
    return [one for one in of_prompts for _ in range(prompts.videos_per_prompt)]


def _read(name: str, value: Pictures, prompts: int) -> list[Any]:
    """One picture, or one per prompt, as diffusers' image processors take them."""
    several: Any = value if _is_batch(value) else [value]
    pictures = [_picture(name, one) for one in several]
    if len(pictures) not in (1, prompts):
        raise InvalidRequest(
            f"{name}: expected one picture or {prompts}, got {len(pictures)}: give one per prompt"
        )
    return pictures


def _picture(name: str, value: object) -> Any:
    if isinstance(value, str | Path):
        return _opened(name, Path(value))
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3:
        return Image.fromarray(value).convert("RGB")
    channels = 0 if isinstance(value, Tensor) else -1
    if isinstance(value, np.ndarray | Tensor) and value.ndim == 3 and value.shape[channels] == 3:
        return value
    got = f"{type(value).__name__} {tuple(value.shape)}" if hasattr(value, "shape") else type(value).__name__
    raise InvalidRequest(
        f"{name}: expected a path, a PIL image, an array (height, width, 3) or a tensor (3, height, width), "
        f"got {got}: convert it"
    )


def _opened(name: str, path: Path) -> Image.Image:
    """A picture file, turned as its camera says; raises InvalidRequest for what is none, or too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                return ImageOps.exif_transpose(picture).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidRequest(
            f"{name}: expected at most {Image.MAX_IMAGE_PIXELS} pixels, got more in {path}: make it smaller, "
            "as the video is"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidRequest(f"{name}: expected a picture, got {path} ({reason}): check the file") from error
