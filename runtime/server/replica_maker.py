"""Has the videos of one worker made by replicas of Ray Serve, whichever is free."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.serve.handle import DeploymentHandle

from .data_folder import DataFolder
from .failures import Failure
from .job import Result
from .refusal import Refusal
from .replica import Begun, Made, Message
from .steps_board import StepTaken
from .video_maker import MakerLost, Run

_log = logging.getLogger(__name__)
_ASK_AGAIN_S = 1.0
# Ray's own errors, those of the event loop in which its router runs, and what a replica raised.
_ERRORS = (Exception, asyncio.CancelledError)


class ReplicaMaker:
    """A video waits in Ray Serve's queue, of which autoscaling knows, until a replica has begun it.

    One maker of a server `asks` during the warm-up if there is a replica: requests that wait start replicas.
    """

    def __init__(self, replicas: DeploymentHandle[Any], folder: DataFolder, *, asks: bool) -> None:
        self._replicas = replicas
        self._videos = replicas.options(stream=True)
        self._folder = folder
        self._asks = asks
        self._lock = threading.Lock()
        self._response: Any = None

    def warm_up(self, check: Callable[[], None]) -> None:
        """Until a replica has made its own warm-up videos."""
        while self._asks:
            response = self._replicas.is_warm.remote()
            with self._stoppable(response):
                check()
                try:
                    response.result()
                    return
                except _ERRORS as error:
                    check()
                    _log.warning("no replica yet: %r", error)
            time.sleep(_ASK_AGAIN_S)

    def make(self, run: Run) -> Result:
        """Raises Refusal with the code and message of a video that failed."""
        job = run.job
        picture = self._folder.load_reference(job.id) if job.has_reference else None
        response = self._videos.make.remote(job.id, job.request, picture)
        with self._stoppable(response):
            run.check()
            for message in _received(response, run):
                if isinstance(message, Begun):
                    run.begin()
                elif isinstance(message, StepTaken):
                    run.step(message)
                elif isinstance(message, Failure):
                    raise Refusal(500, message.message, code=message.code)
                else:
                    return self._kept(job.id, message)
        raise MakerLost("a replica said no more before the video's end")

    def stop(self) -> None:
        """Cancels the request, so that its replica ends within a step."""
        with self._lock:
            if self._response is not None:
                self._response.cancel()

    def _kept(self, id: str, made: Made) -> Result:
        for variant, data in made.files.items():
            self._folder.save_result(id, variant, data)
        return made.result

    @contextmanager
    def _stoppable(self, response: Any) -> Iterator[None]:
        """Cancels the request unless it has been answered to its end."""
        with self._lock:
            self._response = response
        try:
            yield
        except BaseException:
            response.cancel()
            raise
        finally:
            with self._lock:
                self._response = None


def _received(response: Any, run: Run) -> Iterator[Message]:
    """Raises MakerLost if the replica has ended, JobStopped if the job is to."""
    while True:
        try:
            message: Message = next(response)
        except StopIteration:
            return
        except _ERRORS as error:
            run.check()
            raise MakerLost(f"a replica was lost: {error!r}") from error
        yield message
