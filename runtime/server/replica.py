"""A replica of Ray Serve, which makes one video at a time for the server that owns the jobs."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..command import quiet_libraries
from .data_folder import SUFFIXES, DataFolder, Variant
from .failures import Failure, failure_of, leaves_no_gpu
from .job import Result
from .served_model import ModelSource, ServedModel, ServedModels
from .steps_board import StepTaken
from .video_maker import JobStopped, make_video, warm_up
from .video_request import ResolvedRequest


@dataclass(frozen=True)
class Begun:
    """The replica makes the video from now on."""


@dataclass(frozen=True)
class Made:
    """The end of a video that succeeded, with its files: only the server writes into its folder."""

    result: Result
    files: Mapping[Variant, bytes]


Message = Begun | StepTaken | Made | Failure


class VideoReplica:
    """All models, loaded and warm before the first request; its methods are called in one event loop.

    It knows neither the table of jobs nor their folder: a video is a stream of messages to whoever asked.
    """

    def __init__(self, sources: Sequence[ModelSource]) -> None:
        quiet_libraries()
        self._scratch = tempfile.TemporaryDirectory(prefix="stg-trt-")
        self._folder = DataFolder(Path(self._scratch.name))
        # A pipeline belongs to one thread, in which a cancelled video ends before the next one begins.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stg-trt pipeline")
        self._lost: Exception | None = None
        self._models = self._thread.submit(self._open, sources).result()

    def check_health(self) -> None:
        """Raises an error if another process has to take the replica's place."""
        if self._lost is not None:
            raise self._lost

    def __del__(self) -> None:
        """Called by Ray Serve before it ends the process."""
        self._scratch.cleanup()

    async def is_warm(self) -> bool:
        """Answered once the replica is free."""
        return True

    async def make(
        self, id: str, request: ResolvedRequest, picture: Image.Image | None
    ) -> AsyncIterator[Message]:
        """Begun, the steps, then Made or Failure; if it is cancelled, the video ends within a step."""
        self.check_health()
        loop, stopped = asyncio.get_running_loop(), threading.Event()
        messages: asyncio.Queue[Message | None] = asyncio.Queue()

        def send(message: Message) -> None:
            loop.call_soon_threadsafe(messages.put_nowait, message)

        making = loop.run_in_executor(self._thread, self._make, id, request, picture, send, stopped)
        making.add_done_callback(lambda ended: messages.put_nowait(None))
        try:
            yield Begun()
            while (message := await messages.get()) is not None:
                yield message
            await making
        finally:
            stopped.set()
            await asyncio.wait([making])

    def _open(self, sources: Sequence[ModelSource]) -> ServedModels:
        models = ServedModels([ServedModel.open(source) for source in sources])
        for model in models:
            warm_up(model, self._folder, lambda: None)
        return models

    def _make(
        self,
        id: str,
        request: ResolvedRequest,
        picture: Image.Image | None,
        send: Callable[[Message], None],
        stopped: threading.Event,
    ) -> None:
        def check() -> None:
            if stopped.is_set():
                raise JobStopped

        def on_step(step: StepTaken) -> None:
            send(step)
            check()

        try:
            model = self._models.get(request.model)
            result = make_video(model, id, request, picture, self._folder, on_step, check)
            files = {variant: self._folder.result(id, variant).read_bytes() for variant in SUFFIXES}
            send(Made(result, files))
        except JobStopped:
            pass
        except Exception as error:
            if leaves_no_gpu(error):
                self._lost = error
                raise
            send(failure_of(error, id))
        finally:
            self._folder.remove(id)
