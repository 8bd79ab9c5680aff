"""The sizes that one build is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stg_trt.errors import InvalidRequest


@dataclass(frozen=True)
class Size:
    """Pixels and frames of a video."""

    height: int
    width: int
    num_frames: int


def choose_sizes(
    sizes: str | Sequence[str] | None, height: int | None, width: int | None, num_frames: int | None
) -> tuple[Size, ...]:
    """Those of `sizes`, as 704x480x121 (width, height, frames) in a list or between commas, or the one given.

    Raises InvalidRequest for both, for neither, and for other texts.
    """
    one = height, width, num_frames
    if sizes is None or sizes == "":
        if height is None or width is None or num_frames is None:
            raise InvalidRequest(
                "sizes: expected height, width and num_frames, or sizes such as 704x480x121, got "
                f"{', '.join(map(str, one))}: give all three, or --sizes"
            )
        return (Size(height, width, num_frames),)
    if one != (None, None, None):
        raise InvalidRequest(
            f"sizes: expected height, width and num_frames, or sizes, got both: leave {_given(*one)} out"
        )
    texts = sizes.split(",") if isinstance(sizes, str) else sizes
    return tuple(dict.fromkeys(_read(text) for text in texts))


def _read(text: str) -> Size:
    numbers = text.strip().split("x")
    if len(numbers) != 3 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise InvalidRequest(
            f"sizes: expected width, height and frames, as 704x480x121, got {text!r}: correct it"
        )
    width, height, num_frames = map(int, numbers)
    return Size(height, width, num_frames)


def _given(height: int | None, width: int | None, num_frames: int | None) -> str:
    named = {"height": height, "width": width, "num_frames": num_frames}
    return ", ".join(name for name, value in named.items() if value is not None)
