"""From frames to the files of a job: the video, one picture, and a sheet of several."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from stg_trt.system.files import file_sha256, write_atomically

from ..output import VideoPipelineOutput
from ..video_file import save_video
from .data_folder import SUFFIXES, DataFolder

_COLUMNS, _MOST_TILES = 4, 16
_TILE_PIXELS = 320


def write_files(made: VideoPipelineOutput, frame_rate: float, folder: DataFolder, id: str) -> tuple[int, str]:
    """Writes each file whole or not at all; returns their bytes together, and the video's SHA-256."""
    frames = made.frames[0]
    waveform = None if made.audio is None else made.audio.cpu()[0].numpy()
    video = folder.result(id, "video")
    save_video(frames, video, frame_rate, waveform, made.audio_sampling_rate)
    _flush(video)
    write_atomically(folder.result(id, "thumbnail"), _encoded(_pictures(frames[:1])[0], "WEBP"))
    write_atomically(folder.result(id, "spritesheet"), _encoded(_sheet(frames), "JPEG"))
    return sum(folder.result(id, variant).stat().st_size for variant in SUFFIXES), file_sha256(video)


def moving_picture(frames: npt.NDArray[np.uint8], seconds: float) -> bytes:
    """Frames (frames, height, width, 3) as a WebP that repeats."""
    first, *others = (Image.fromarray(frame) for frame in frames)
    data = io.BytesIO()
    duration = round(1000 * seconds / len(frames))
    first.save(data, "WEBP", save_all=True, append_images=others, duration=duration, loop=0, quality=90)
    return data.getvalue()


def _flush(path: Path) -> None:
    """On the disk, so that a job that is completed has its video whatever happens to the machine."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sheet(frames: npt.NDArray[np.float32]) -> Image.Image:
    """Up to 16 frames, evenly spaced in time, in rows of four."""
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), _MOST_TILES)).round().astype(int)
    tiles = _pictures(frames[chosen])
    for tile in tiles:
        tile.thumbnail((_TILE_PIXELS, _TILE_PIXELS))
    width, height = tiles[0].size
    columns = min(_COLUMNS, len(tiles))
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height))
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        sheet.paste(tile, (column * width, row * height))
    return sheet


def _pictures(frames: npt.NDArray[np.float32]) -> list[Image.Image]:
    return [Image.fromarray((frame * 255).round().clip(0, 255).astype(np.uint8)) for frame in frames]


def _encoded(picture: Image.Image, kind: str) -> bytes:
    data = io.BytesIO()
    picture.save(data, kind, quality=85)
    return data.getvalue()
