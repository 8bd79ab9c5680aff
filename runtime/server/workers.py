"""The workers of a server: one for each video that it makes at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from .data_folder import DataFolder
from .job_store import JobStore
from .metrics import Metrics
from .steps_board import StepsBoard
from .video_maker import VideoMaker
from .worker import Worker


class Workers:
    """As `Worker`, of which there is one for each maker. `ended` is set when the first of them has ended."""

    def __init__(
        self,
        makers: Sequence[VideoMaker],
        store: JobStore,
        folder: DataFolder,
        board: StepsBoard,
        metrics: Metrics,
    ) -> None:
        self.ended = threading.Event()
        self._workers = [
            Worker(number, maker, store, folder, board, metrics, self.ended)
            for number, maker in enumerate(makers)
        ]

    def start(self) -> None:
        """All of them."""
        for worker in self._workers:
            worker.start()

    def wake(self) -> None:
        """There may be a new job."""
        for worker in self._workers:
            worker.wake()

    def stop(self, wait_s: float) -> None:
        """None takes a further job; waits for those that run."""
        for worker in self._workers:
            worker.stop()
        end = time.monotonic() + wait_s
        for worker in self._workers:
            if worker.is_alive():
                worker.join(max(0.0, end - time.monotonic()))

    def release(self) -> None:
        """Each stops within a step; jobs that run go back to the queue."""
        for worker in self._workers:
            worker.release()

    def join(self) -> None:
        """Until all have ended."""
        for worker in self._workers:
            if worker.is_alive():
                worker.join()

    def interrupt(self, id: str) -> None:
        """Stops a job within a step."""
        for worker in self._workers:
            worker.interrupt(id)

    @property
    def ready(self) -> bool:
        """True once all are warm, until one has ended."""
        return all(worker.ready.is_set() for worker in self._workers) and not self.ended.is_set()

    @property
    def alive(self) -> bool:
        """True while all of them work."""
        return all(worker.is_alive() for worker in self._workers)

    @property
    def failure(self) -> Exception | None:
        """What ended a worker, other than `stop`."""
        return next((worker.failure for worker in self._workers if worker.failure is not None), None)
