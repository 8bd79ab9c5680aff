"""Frames and sound to an MP4 file, and the frames of a video file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import CancelledError
from fractions import Fraction
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from stg_trt.errors import InvalidRequest

if TYPE_CHECKING:
    from av import Packet
    from av.container import OutputContainer


def save_video(
    frames: npt.NDArray[np.float32],
    path: Path,
    frame_rate: float,
    audio: npt.NDArray[np.float32] | None = None,
    audio_sampling_rate: int | None = None,
    stop: Event | None = None,
) -> None:
    """Writes frames (frames, height, width, 3) in 0..1 as H.264, whole or not at all.

    A waveform `audio` (channels, samples) in -1..1 beside them becomes AAC; one or two channels. Raises
    CancelledError soon after another thread has set `stop`.
    """
    import av

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with av.open(temporary, "w", format="mp4") as container:
            encoders = [_frame_encoder(container, frames, frame_rate)]
            if audio is not None:
                assert audio_sampling_rate is not None
                encoders.append(_sound_encoder(container, audio, audio_sampling_rate, len(frames)))
            # Side by side, so that a player finds the sound near its frames.
            for packets in zip(*encoders, strict=True):
                if stop is not None and stop.is_set():
                    raise CancelledError
                container.mux([packet for several in packets for packet in several])
        temporary.replace(path)
    except av.FFmpegError as error:
        raise InvalidRequest(
            f"output: expected to write {path}, got {error.strerror}: choose another or free disk space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _frame_encoder(
    container: OutputContainer, frames: npt.NDArray[np.float32], frame_rate: float
) -> Iterator[list[Packet]]:
    """Adds a stream of the frames; yields the packets that each gives, and then the last ones."""
    import av

    # Not rounded to a whole number: 24000/1001 is 23.976 of them in a second.
    rate = Fraction(frame_rate).limit_denominator(1001)
    stream = container.add_stream("libx264", rate=rate, options={"crf": "12"})
    # yuv420p halves the colour planes: odd sides cannot be encoded.
    stream.height, stream.width = (side - side % 2 for side in frames.shape[1:3])
    stream.pix_fmt = "yuv420p"

    def encode() -> Iterator[list[Packet]]:
        for frame in frames[:, : stream.height, : stream.width]:
            pixels = np.ascontiguousarray((frame * 255).round().clip(0, 255).astype(np.uint8))
            yield stream.encode(av.VideoFrame.from_ndarray(pixels))
        yield stream.encode()

    return encode()


def _sound_encoder(
    container: OutputContainer, audio: npt.NDArray[np.float32], sampling_rate: int, pieces: int
) -> Iterator[list[Packet]]:
    """The same of a waveform, cut into as many pieces as there are frames."""
    import av

    layout = {1: "mono", 2: "stereo"}[len(audio)]
    stream = container.add_stream("aac", rate=sampling_rate, layout=layout, options={"b": "256k"})

    def encode() -> Iterator[list[Packet]]:
        start = 0
        for piece in np.array_split(audio, pieces, axis=1):
            samples = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), "fltp", layout)
            samples.sample_rate = sampling_rate
            # Counted, so that what the encoder puts before the sound is left out when it is played.
            samples.pts, samples.time_base = start, Fraction(1, sampling_rate)
            start += piece.shape[1]
            yield stream.encode(samples)
        yield stream.encode()

    return encode()


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
