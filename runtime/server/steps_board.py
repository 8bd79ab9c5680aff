"""The steps of the job that runs, for those who watch it from the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypedDict


class StepJson(TypedDict):
    """One denoising step: its number from 1, of how many, its noise level (1 is noise), and its seconds."""

    step: int
    steps: int
    sigma: float
    seconds: float
    progress: int


@dataclass(frozen=True)
class StepTaken:
    """A step that has ended; `seconds` since the one before."""

    step: int
    steps: int
    sigma: float
    seconds: float

    @property
    def progress(self) -> int:
        """Percent; the last one is for decoding and encoding."""
        return 99 * self.step // self.steps

    @property
    def json(self) -> StepJson:
        """As the API shows it."""
        return {
            "step": self.step,
            "steps": self.steps,
            "sigma": round(self.sigma, 6),
            "seconds": round(self.seconds, 6),
            "progress": self.progress,
        }


class StepsBoard:
    """The worker writes; watchers are woken at every step, and whenever a job's status changes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._job: str | None = None
        self._steps: list[StepTaken] = []
        self._watchers: set[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = set()

    def begin(self, job: str) -> None:
        """Forgets the last job's steps."""
        with self._lock:
            self._job, self._steps = job, []
        self.wake()

    def add(self, step: StepTaken) -> None:
        """A step of the job that runs."""
        with self._lock:
            self._steps.append(step)
        self.wake()

    def steps(self, job: str) -> tuple[StepTaken, ...]:
        """Those of a job so far; none if it is not the one that runs, or ran last."""
        with self._lock:
            return tuple(self._steps) if job == self._job else ()

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
