"""The sizes that a build fixes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stg_trt.errors import InvalidRequest

_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Workload:
    """Pixels, frames, text tokens, and the precision of weights and activations.

    `condition_frames` are the latent frames of pictures for later frames: tokens beside the video's.
    """

    height: int
    width: int
    num_frames: int
    text_length: int
    precision: str = "fp32"
    condition_frames: int = 0

    def __post_init__(self) -> None:
        if self.precision not in _PRECISIONS:
            raise InvalidRequest(
                f"precision: expected one of {', '.join(_PRECISIONS)}, got {self.precision!r}: choose one"
            )

    @property
    def dtype(self) -> str:
        """The dtype of weights and activations outside the float32 islands."""
        return _PRECISIONS[self.precision]

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
        return f"{self.width}x{self.height}x{self.num_frames}{beside}"
