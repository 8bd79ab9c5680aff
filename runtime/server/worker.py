"""The thread that sees to jobs, one after the other: a video fills a GPU."""

from __future__ import annotations

import logging
import threading
import time

from .data_folder import DataFolder
from .failures import failure_of, leaves_no_gpu
from .job import Job, Result
from .job_store import JobStore
from .metrics import Metrics
from .steps_board import StepsBoard, StepTaken
from .video_maker import JobStopped, MakerLost, VideoMaker

_log = logging.getLogger(__name__)
_IDLE_S = 1.0
# Outcomes of jobs that are made later, and need their files until then.
_WAITING_AGAIN = ("released", "retried")


class Worker(threading.Thread):
    """Takes jobs until it is told to stop; no job's error ends it.

    `failure` is the exception to that: what went wrong in a warm-up video, or what leaves the GPU unusable to
    this process. `ended`, which workers share, is set then, and when it has stopped.
    """

    def __init__(
        self,
        number: int,
        maker: VideoMaker,
        store: JobStore,
        folder: DataFolder,
        board: StepsBoard,
        metrics: Metrics,
        ended: threading.Event,
    ) -> None:
        super().__init__(name=f"stg-trt worker {number}", daemon=True)
        self._number = number
        self._maker = maker
        self._store = store
        self._folder = folder
        self._board = board
        self._metrics = metrics
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._run: _Run | None = None
        self._ended = ended
        self.ready = threading.Event()
        self.failure: Exception | None = None

    def run(self) -> None:
        """Warms up, then works."""
        try:
            self._maker.warm_up(self._check_stopping)
        except JobStopped:
            pass
        except Exception as error:
            self.failure = error
        else:
            self.ready.set()
            self._work()
        self._ended.set()
        self._board.wake()

    def wake(self) -> None:
        """There may be a new job."""
        self._wake.set()

    def stop(self) -> None:
        """Takes no further job; one that waits for its turn goes on waiting in the queue."""
        self._stopping.set()
        self._wake.set()
        with self._lock:
            if self._run is None or self._run.claimed is None:
                self._stop_run()

    def release(self) -> None:
        """Stops within a step; the job that runs goes back to the queue."""
        self._stopping.set()
        self._wake.set()
        with self._lock:
            self._stop_run()

    def interrupt(self, id: str) -> None:
        """Stops a job within a step, if it is the one that runs."""
        with self._lock:
            if self._run is not None and self._run.job.id == id:
                self._stop_run()

    def _stop_run(self) -> None:
        if self._run is not None:
            self._run.stopped.set()
        self._maker.stop()

    def _check_stopping(self) -> None:
        if self._stopping.is_set():
            raise JobStopped

    def _work(self) -> None:
        unwritten: Job | None = None
        while not self._stopping.is_set():
            run = None
            try:
                if unwritten is not None:
                    self._store.retry(unwritten)
                    unwritten = None
                job = self._store.reserve()
                if job is None:
                    self._wake.wait(_IDLE_S)
                    self._wake.clear()
                else:
                    run = _Run(job, self._number, self._store, self._board, self._metrics)
                    self._see_to(run)
            except Exception:  # The database, such as on a full disk: the next round may succeed.
                _log.exception("the queue of videos")
                unwritten = run.claimed if run is not None and run.claimed is not None else unwritten
                time.sleep(_IDLE_S)

    def _see_to(self, run: _Run) -> None:
        """From the job's reservation to its end."""
        with self._lock:
            self._run = run
            if self._stopping.is_set():
                run.stopped.set()
        outcome = "cancelled"
        try:
            outcome = self._outcome(run)
        except Exception:
            outcome = "retried"
            raise
        finally:
            with self._lock:
                self._run = None
            self._store.unreserve(run.job)
            if run.claimed is not None:
                self._tidy(run.job, outcome)
                self._metrics.count_video(run.job.request.model, outcome, time.perf_counter() - run.start)
            self._board.wake()

    def _outcome(self, run: _Run) -> str:
        """What became of a job: `completed`, the code of its error, or why it waits again."""
        try:
            result = self._maker.make(run)
        except JobStopped:
            # Of a cancelled job nothing is left to give back.
            released = run.claimed is not None and self._store.release(run.claimed)
            return "released" if released else "cancelled"
        except MakerLost as error:
            return self._lost(run, error)
        except Exception as error:
            if leaves_no_gpu(error):
                # Whoever starts the server again gives the job its second attempt.
                self.failure = error
                self._stopping.set()
                return "retried"
            # Errors before the claim are those of the store.
            if run.claimed is None:
                raise
            failure = failure_of(error, run.job.id)
            return (
                failure.code if self._store.fail(run.claimed, failure.code, failure.message) else "cancelled"
            )
        return self._completed(run, result)

    def _completed(self, run: _Run, result: Result) -> str:
        self._metrics.count_stages(run.job.request.model, result.stages)
        assert run.claimed is not None
        return "completed" if self._store.complete(run.claimed, result) else "cancelled"

    def _lost(self, run: _Run, error: MakerLost) -> str:
        """The job is made again, from its seed; it has one attempt less if it had begun."""
        _log.warning("%s: %s", run.job.id, error)
        if run.claimed is None:
            # Whatever was lost may take a moment to be replaced.
            self._stopping.wait(_IDLE_S)
            return "retried"
        return self._store.retry(run.claimed) or "cancelled"

    def _tidy(self, job: Job, outcome: str) -> None:
        """A job that is over needs its picture no more; one that has no video, no files."""
        if outcome == "completed":
            self._folder.remove_reference(job.id)
        elif outcome not in _WAITING_AGAIN:
            self._folder.remove(job.id)


class _Run:
    """A job that a worker has reserved; `claimed` once its turn has come, at `start`."""

    def __init__(self, job: Job, worker: int, store: JobStore, board: StepsBoard, metrics: Metrics) -> None:
        self.job = job
        self.claimed: Job | None = None
        self.start = 0.0
        self.stopped = threading.Event()
        self._worker = worker
        self._store = store
        self._board = board
        self._metrics = metrics

    def begin(self) -> None:
        """Raises JobStopped if the job was cancelled while it waited."""
        self.check()
        self.start = time.perf_counter()
        self.claimed = self._store.claim(self.job.id)
        if self.claimed is None:
            raise JobStopped
        self._board.begin(self._worker, self.job.id)
        self.check()

    def step(self, step: StepTaken) -> None:
        """Tells who watches."""
        self._board.add(self._worker, step)
        self._metrics.count_step(self.job.request.model, step.seconds)
        self.check()

    def check(self) -> None:
        """Raises JobStopped."""
        if self.stopped.is_set():
            raise JobStopped
