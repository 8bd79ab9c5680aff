"""The sizes that a build fixes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from stg_trt.errors import InvalidRequest

FLOAT8 = "fp8"
# Of activations and of weights that are not FP8 numbers.
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", FLOAT8: "bfloat16"}


def chosen_frame_rate(given: float | None, usual: float) -> float:
    """Frames per second: those that were given, or the usual ones; raises InvalidRequest for none above 0."""
    rate = usual if given is None else given
    if not 0 < rate < math.inf:
        raise InvalidRequest(f"frame_rate: expected frames per second above 0, got {rate}: use {usual:g}")
    return rate


@dataclass(frozen=True)
class Workload:
    """Pixels, frames, text tokens, and the precision of weights and activations.

    `condition_frames` are the latent frames of pictures for later frames: tokens beside the video's.
    `audio_num_frames` are latents in time of the sound. `activations` is the precision around FP8 products,
    where it is not bf16.
    """

    height: int
    width: int
    num_frames: int
    text_length: int
    precision: str = "fp32"
    condition_frames: int = 0
    audio_num_frames: int = 0
    activations: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in _DTYPES:
            raise InvalidRequest(
                f"precision: expected one of {', '.join(_DTYPES)}, got {self.precision!r}: choose one"
            )

    @property
    def dtype(self) -> str:
        """The dtype of activations, and of weights that are not FP8, outside the float32 islands."""
        return _DTYPES[self.activations or self.precision]

    @property
    def is_float8(self) -> bool:
        """Whether the large products of the blocks are FP8."""
        return self.precision == FLOAT8

    def resized(self, height: int | None, width: int | None, num_frames: int | None) -> Workload:
        """The same with other sizes; None keeps one."""
        return replace(
            self,
            height=self.height if height is None else height,
            width=self.width if width is None else width,
            num_frames=self.num_frames if num_frames is None else num_frames,
        )

    def __str__(self) -> str:
        beside = f"+{self.condition_frames}" if self.condition_frames else ""
        sound = f"a{self.audio_num_frames}" if self.audio_num_frames else ""
        return f"{self.width}x{self.height}x{self.num_frames}{beside}{sound}"
