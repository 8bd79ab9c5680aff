"""The steps of the jobs that run, for those who watch it from the event loop."""

from __future__ import annotations

import asyncio
import threading
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

from stg_trt.models.preview import Frames

from .video_files import moving_picture


class StepJson(TypedDict, total=False):
    """One denoising step: its number from 1, of how many, its noise level (1 is noise), and its seconds.

    `distances` are the other passes' from cond; `preview` is a data URL of a small moving picture.
    """

    step: int
    steps: int
    sigma: float
    seconds: float
    progress: int
    distances: dict[str, float]
    preview: str


@dataclass(frozen=True, eq=False)
class StepPreview:
    """Frames (frames, rows, columns, 3) of a video of so many seconds."""

    frames: Frames
    seconds: float

    @cached_property
    def url(self) -> str:
        """A moving WebP as a data URL, made when a watcher first asks for it."""
        return f"data:image/webp;base64,{b64encode(moving_picture(self.frames, self.seconds)).decode()}"


@dataclass(frozen=True)
class StepTaken:
    """A step that has ended."""

    step: int
    steps: int
    sigma: float
    seconds: float
    distances: Mapping[str, float]
    preview: StepPreview | None

    @property
    def progress(self) -> int:
        """Percent; the last one is for decoding and encoding."""
        return 99 * self.step // self.steps

    @property
    def json(self) -> StepJson:
        """As the API shows it."""
        shown: StepJson = {
            "step": self.step,
            "steps": self.steps,
            "sigma": round(self.sigma, 6),
            "seconds": round(self.seconds, 6),
            "progress": self.progress,
            "distances": {name: round(share, 6) for name, share in self.distances.items()},
        }
        if self.preview is not None:
            shown["preview"] = self.preview.url
        return shown


class StepsBoard:
    """Workers write; watchers are woken at every step, and whenever a job's status changes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[int, tuple[str, list[StepTaken]]] = {}
        self._watchers: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def begin(self, worker: int, job: str) -> None:
        """Forgets the steps of the worker's last job, and those of the job's last run."""
        with self._lock:
            self._runs = {number: run for number, run in self._runs.items() if run[0] != job}
            self._runs[worker] = job, []
        self.wake()

    def add(self, worker: int, step: StepTaken) -> None:
        """A step of the job that the worker runs."""
        with self._lock:
            self._runs[worker][1].append(step)
        self.wake()

    def steps(self, job: str) -> tuple[StepTaken, ...]:
        """Those of a job so far; none if it is not one that a worker runs, or ran last."""
        with self._lock:
            return next((tuple(steps) for one, steps in self._runs.values() if one == job), ())

    def progress(self, job: str) -> int:
        """Percent of a job that runs."""
        steps = self.steps(job)
        return steps[-1].progress if steps else 0

    def wake(self) -> None:
        """Wakes the watchers; called from any thread."""
        with self._lock:
            watchers = [*self._watchers]
        for loop, event in watchers:
            with suppress(RuntimeError):  # Its loop has been closed.
                loop.call_soon_threadsafe(event.set)

    @contextmanager
    def watch(self) -> Iterator[asyncio.Event]:
        """An event that is set at every change; its user clears it before looking."""
        watcher = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._watchers.add(watcher)
        try:
            yield watcher[1]
        finally:
            with self._lock:
                self._watchers.discard(watcher)
