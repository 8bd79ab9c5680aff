"""Frames and sound written to a file, read back by a decoder."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from stg_trt.errors import InvalidRequest
from stg_trt.runtime.video_file import save_video

AAC_FRAME = 1024


def sweep(seconds: float, rate: int, channels: int) -> Any:
    """Tones that rise, each channel's its own; (channels, samples)."""
    time = np.arange(round(seconds * rate)) / rate
    tones = [0.5 / (i + 1) * np.sin(2 * np.pi * (200 * (i + 1) + 300 * time) * time) for i in range(channels)]
    return np.stack(tones).astype(np.float32)


def noise(frames: int, height: int = 64, width: int = 96) -> Any:
    return np.random.default_rng(0).random((frames, height, width, 3), dtype=np.float32)


def read_sound(path: Path) -> Any:
    with av.open(path) as container:
        return np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)


@pytest.mark.parametrize("rate", [24_000, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("frame_rate", [24_000 / 1001, 24.5, 24.0])
def test_sound_plays_beside_the_frames(tmp_path: Path, rate: int, channels: int, frame_rate: float) -> None:
    frames = 17
    audio = sweep(frames / frame_rate, rate, channels)
    path = tmp_path / "x.mp4"
    save_video(noise(frames), path, frame_rate, audio, rate)
    with av.open(path) as container:
        (video,), (sound,) = container.streams.video, container.streams.audio
        assert video.frames == frames and video.codec_context.name == "h264"
        assert video.average_rate == Fraction(frame_rate).limit_denominator(1001)
        assert (sound.codec_context.name, sound.sample_rate) == ("aac", rate)
        assert sound.channels == channels and sound.start_time == 0
        assert sound.duration is not None and sound.time_base is not None
        assert abs(sound.duration * sound.time_base * rate - audio.shape[1]) <= AAC_FRAME
    read = read_sound(path)[:, : audio.shape[1]]
    assert read.shape == audio.shape
    # What the codec loses, most of it at the start; a frame later it would be another sound.
    settled = slice(2 * AAC_FRAME, None)
    off = np.linalg.norm((read - audio)[:, settled]) / np.linalg.norm(audio[:, settled])
    late = np.linalg.norm(read[:, AAC_FRAME:] - audio[:, :-AAC_FRAME]) / np.linalg.norm(audio)
    assert off < 0.05 and late > 0.5


@pytest.mark.slow(reason="encodes 24 seconds of video")
def test_sound_lies_beside_its_frames(tmp_path: Path) -> None:
    """In the file too, however long it is: a player needs not look for the sound of what it shows."""
    path, seconds = tmp_path / "x.mp4", 24
    save_video(noise(10 * seconds, 16, 16), path, 10.0, sweep(seconds, 24_000, 2), 24_000)
    with av.open(path) as container:
        packets = sorted((packet for packet in container.demux() if packet.size), key=lambda one: one.pos)
        times = [float((packet.dts or 0) * packet.time_base) for packet in packets]
        assert {packet.stream.type for packet in packets} == {"video", "audio"}
    assert max(before - after for before, after in pairwise(times)) < 2.0


def test_a_silent_video_has_no_sound(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    save_video(noise(5, 33, 47), path, 25.0)
    with av.open(path) as container:
        assert not container.streams.audio
        assert (container.streams.video[0].height, container.streams.video[0].width) == (32, 46)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    """AAC has no such rate."""
    with pytest.raises(InvalidRequest, match=r"output: expected to write .*x\.mp4, got .*: choose another"):
        save_video(noise(5), tmp_path / "x.mp4", 25.0, sweep(0.2, 1000, 2), 1000)
    assert [*tmp_path.iterdir()] == []
