"""Makes the video of a job in this process; the border at which a worker may use another process instead."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import torch
from PIL import Image

from stg_trt.system.units import MIB

from ..stages import Stage
from .data_folder import DataFolder
from .job import Job, Result
from .served_model import ServedModel, ServedModels
from .steps_board import StepTaken
from .video_files import write_files
from .video_request import ResolvedRequest

_log = logging.getLogger(__name__)
_WARM_UP_ID = f"video_{0:032x}"


class JobStopped(Exception):
    """The job that runs is to end at once."""


class MakerLost(Exception):
    """The process that made the video has ended; another attempt may succeed."""


class Run(Protocol):
    """A job that a worker has chosen. Each method raises JobStopped once the job is to end."""

    @property
    def job(self) -> Job:
        """As it was when it waited."""

    def begin(self) -> None:
        """The job's turn has come: it is in progress from now on."""

    def step(self, step: StepTaken) -> None:
        """A step has ended."""

    def check(self) -> None:
        """Called whenever nothing else is, so that the job can end."""


class VideoMaker(Protocol):
    """Used by one worker's thread, except for `stop`."""

    def warm_up(self, check: Callable[[], None]) -> None:
        """Returns when videos can be made without delay; `check` may raise JobStopped."""

    def make(self, run: Run) -> Result:
        """Leaves the job's files in the server's folder; raises MakerLost, and the pipeline's errors."""

    def stop(self) -> None:
        """Ends a wait at once, so that `check` is called; from any thread."""


class LocalMaker:
    """Makes videos in the worker's own thread."""

    def __init__(self, models: ServedModels, folder: DataFolder) -> None:
        self._models = models
        self._folder = folder

    def warm_up(self, check: Callable[[], None]) -> None:
        """A short video of each model."""
        for model in self._models:
            warm_up(model, self._folder, check)

    def make(self, run: Run) -> Result:
        """Raises whatever the pipeline does."""
        run.begin()
        job = run.job
        picture = self._folder.load_reference(job.id) if job.has_reference else None
        model = self._models.get(job.request.model)
        return make_video(model, job.id, job.request, picture, self._folder, run.step, run.check)

    def stop(self) -> None:
        """Nothing waits here: steps call `check`."""


def make_video(
    model: ServedModel,
    id: str,
    request: ResolvedRequest,
    picture: Image.Image | None,
    folder: DataFolder,
    on_step: Callable[[StepTaken], None],
    check: Callable[[], None],
) -> Result:
    """Writes the files of a video; `on_step` and `check` may raise to stop."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    made = model.generate(request, picture, on_step)
    check()
    sampled = time.perf_counter()
    size, sha256 = write_files(made, request.fps, folder, id)
    end = time.perf_counter()
    stages: dict[Stage, float] = {**made.stages, "encode": end - sampled}
    # What is done between the steps, such as telling who watches, is no other stage's.
    stages["denoise"] += end - start - sum(stages.values())
    peak = torch.cuda.max_memory_allocated() / MIB if gpu else None
    return Result(size, sha256, end - start, peak, stages)


def warm_up(model: ServedModel, folder: DataFolder, check: Callable[[], None]) -> None:
    """A short video, which loads all that later ones need; `check` may raise to stop."""
    start = time.perf_counter()
    request, picture = model.warm_up_request()
    try:
        made = model.generate(request, picture, lambda step: check())
        write_files(made, request.fps, folder, _WARM_UP_ID)
    finally:
        folder.remove(_WARM_UP_ID)
    _log.info("%s: warm-up video in %.1f s", model.name, time.perf_counter() - start)
