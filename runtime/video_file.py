"""Frames to an MP4 file, and those of a video file."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from stg_trt.errors import InvalidRequest


def save_video(frames: npt.NDArray[np.float32], path: Path, frame_rate: float) -> None:
    """Writes frames (frames, height, width, 3) in 0..1 as H.264, whole or not at all."""
    import av

    # yuv420p halves the colour planes: odd sides cannot be encoded.
    height, width = (side - side % 2 for side in frames.shape[1:3])
    rate = Fraction(frame_rate).limit_denominator(1001)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with av.open(temporary, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "12"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            for image in (frames[:, :height, :width] * 255).round().clip(0, 255).astype(np.uint8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image))))
            container.mux(stream.encode())
        temporary.replace(path)
    except av.FFmpegError as error:
        raise InvalidRequest(
            f"output: expected to write {path}, got {error.strerror}: choose another or free disk space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_video(name: str, path: Path) -> list[Image.Image]:
    """The frames of a video file, or of a picture; raises InvalidRequest for what is none."""
    import av

    try:
        with av.open(path) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        reason = getattr(error, "strerror", None) or "no pictures in it"
        raise InvalidRequest(f"{name}: expected a video, got {path} ({reason}): check the file") from error
    if not frames:
        raise InvalidRequest(f"{name}: expected a video, got {path} without frames: check the file")
    return frames
