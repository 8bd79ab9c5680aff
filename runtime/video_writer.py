"""The files of a call's videos, each encoded in a thread while later videos are decoded."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING

from .video_file import save_video

if TYPE_CHECKING:
    from .output import VideoPipelineOutput
    from .pipeline import VideoPipeline


class VideoWriter:
    """One file per video: video.mp4, or video-0.mp4, video-1.mp4 and so on.

    Whoever leaves it before `finish` has returned keeps the files that are whole by then.
    """

    def __init__(self, output: Path, frame_rate: float) -> None:
        self._output = output
        self._frame_rate = frame_rate
        self._thread = ThreadPoolExecutor(1)
        self._stop = Event()
        self._files: list[Future[Path]] = []

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.shutdown(cancel_futures=True)

    def take(self, pipe: VideoPipeline, index: int, made: VideoPipelineOutput) -> None:
        """A `callback_on_video_end`; raises InvalidRequest if an earlier file could not be written."""
        for file in self._files:
            if file.done():
                file.result()
        path = self._output
        if pipe.num_videos > 1:
            path = path.with_name(f"{path.stem}-{index}{path.suffix}")
        self._files.append(self._thread.submit(self._write, made, path))

    def finish(self) -> list[Path]:
        """Waits for the files and returns their names; raises as `take`."""
        return [file.result() for file in self._files]

    def _write(self, made: VideoPipelineOutput, path: Path) -> Path:
        waveform = None if made.audio is None else made.audio[0].cpu().numpy()
        save_video(made.frames[0], path, self._frame_rate, waveform, made.audio_sampling_rate, self._stop)
        return path
