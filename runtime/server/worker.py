"""The thread that makes the videos, one after the other: a video fills a machine."""

from __future__ import annotations

import errno
import gc
import logging
import threading
import time

import torch

from stg_trt.errors import InvalidRequest, NotFinite, StgTrtError, is_out_of_memory
from stg_trt.system.units import MIB

from ..stages import Stage
from .data_folder import DataFolder
from .job import Job, Result
from .job_store import JobStore
from .metrics import Metrics
from .refusal import Refusal, from_library
from .served_model import ServedModel, ServedModels
from .steps_board import StepsBoard, StepTaken
from .video_files import write_files

_log = logging.getLogger(__name__)
_IDLE_S = 1.0
_WARM_UP_ID = f"video_{0:032x}"


class JobStopped(Exception):
    """The job that runs is to end at once."""


class Worker(threading.Thread):
    """Claims jobs until it is told to stop; no job's error ends it.

    `failure` is the exception to that: what went wrong in a warm-up video, or what leaves the GPU unusable to
    this process. `ended` is set then, and when it has stopped.
    """

    def __init__(
        self, models: ServedModels, store: JobStore, folder: DataFolder, board: StepsBoard, metrics: Metrics
    ) -> None:
        super().__init__(name="stg-trt worker", daemon=True)
        self._models = models
        self._store = store
        self._folder = folder
        self._board = board
        self._metrics = metrics
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: str | None = None
        self._stopped = threading.Event()
        self._release = False
        self.ready = threading.Event()
        self.ended = threading.Event()
        self.failure: Exception | None = None

    def run(self) -> None:
        """Warms up, then works."""
        try:
            for model in self._models:
                self._warm_up(model)
        except JobStopped:
            pass
        except Exception as error:
            self.failure = error
        else:
            self.ready.set()
            self._work()
        self.ended.set()
        self._board.wake()

    def wake(self) -> None:
        """There may be a new job."""
        self._wake.set()

    def stop(self) -> None:
        """Takes no further job."""
        self._stopping.set()
        self._wake.set()

    def release(self) -> None:
        """Stops within a step; the job that runs goes back to the queue."""
        with self._lock:
            self._release = True
            self._stopped.set()
        self.stop()

    def interrupt(self, id: str) -> None:
        """Stops a job within a step, if it is the one that runs."""
        with self._lock:
            if self._running == id:
                self._stopped.set()

    def _work(self) -> None:
        unwritten = False
        while not self._stopping.is_set():
            try:
                if unwritten:
                    self._store.recover()
                    unwritten = False
                job = self._store.claim()
                if job is None:
                    self._wake.wait(_IDLE_S)
                    self._wake.clear()
                else:
                    self._run(job)
            except Exception:  # The database, such as on a full disk: the next round may succeed.
                _log.exception("the queue of videos")
                unwritten = True
                time.sleep(_IDLE_S)

    def _run(self, job: Job) -> None:
        with self._lock:
            self._running = job.id
            if not self._release:
                self._stopped.clear()
        self._board.begin(job.id)
        start = time.perf_counter()
        outcome = "cancelled"
        try:
            # Cancelled between its claim and this moment.
            current = self._store.get(job.id)
            if current is None or current.fence != job.fence or current.status != "in_progress":
                raise JobStopped
            result = self._make(job)
            if self._store.complete(job, result):
                outcome = "completed"
        except JobStopped:
            if self._release and self._store.release(job):
                outcome = "released"
        except Exception as error:
            if _leaves_no_gpu(error):
                # Whoever starts the server again gives the job its second attempt.
                outcome, self.failure = "interrupted", error
                self._stopping.set()
                return
            code, message = _failure(error)
            _log.warning("%s: %s", job.id, message, exc_info=code == "internal_error")
            outcome = "interrupted"  # Unless it can be written down.
            outcome = code if self._store.fail(job, code, message) else "cancelled"
            _free_memory(error)
        finally:
            with self._lock:
                self._running = None
            self._tidy(job, outcome)
            self._metrics.count_video(job.request.model, outcome, time.perf_counter() - start)
            self._board.wake()

    def _make(self, job: Job) -> Result:
        """Raises JobStopped, and whatever the pipeline does."""
        model = self._models.get(job.request.model)
        picture = self._folder.load_reference(job.id) if job.has_reference else None
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.reset_peak_memory_stats()

        def on_step(step: StepTaken) -> None:
            self._board.add(step)
            self._metrics.count_step(model.name, step.seconds)
            self._check_stopped()

        start = time.perf_counter()
        made = model.generate(job.request, picture, on_step)
        self._check_stopped()
        sampled = time.perf_counter()
        size, sha256 = write_files(made, job.request.fps, self._folder, job.id)
        end = time.perf_counter()
        stages: dict[Stage, float] = {**made.stages, "encode": end - sampled}
        # What is done between the steps, such as telling who watches, is no other stage's.
        stages["denoise"] += end - start - sum(stages.values())
        self._metrics.count_stages(model.name, stages)
        peak = torch.cuda.max_memory_allocated() / MIB if gpu else None
        return Result(size, sha256, end - start, peak, stages)

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise JobStopped

    def _tidy(self, job: Job, outcome: str) -> None:
        """A job that is over needs its picture no more; one that has no video, no files."""
        if outcome == "completed":
            self._folder.remove_reference(job.id)
        elif outcome not in ("released", "interrupted"):
            self._folder.remove(job.id)

    def _warm_up(self, model: ServedModel) -> None:
        start = time.perf_counter()
        request, picture = model.warm_up_request()
        try:
            made = model.generate(request, picture, lambda step: self._check_stopped())
            write_files(made, request.fps, self._folder, _WARM_UP_ID)
        finally:
            self._folder.remove(_WARM_UP_ID)
        _log.info("%s: warm-up video in %.1f s", model.name, time.perf_counter() - start)


def _failure(error: Exception) -> tuple[str, str]:
    """The code and message of a job's error; a defect of ours is not explained to clients."""
    if is_out_of_memory(error):
        said = str(error).splitlines()[0] if isinstance(error, StgTrtError) else "the machine has no more"
        return "out_of_memory", f"out of memory: {said}; fewer frames or a smaller size need less"
    if isinstance(error, NotFinite):
        return "not_finite", str(error)
    if isinstance(error, Refusal):
        return error.code, error.message
    if isinstance(error, StgTrtError):
        # The video file cannot be written: its path is no client's business.
        if isinstance(error, InvalidRequest) and str(error).startswith("output: "):
            return "disk_full", "The server cannot write the video: its disk is full or not writable."
        return "invalid_request", from_library(error).message
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk_full", "The server has no free disk space for the video."
    return "internal_error", "The server could not make this video because of an error of its own."


def _leaves_no_gpu(error: Exception) -> bool:
    """CUDA says the same of every later call, such as after an illegal memory access."""
    return "CUDA error: " in str(error) and not is_out_of_memory(error)


def _free_memory(error: Exception) -> None:
    """Frames of the traceback hold tensors; torch keeps what they leave for itself."""
    if is_out_of_memory(error):
        error.__traceback__ = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
