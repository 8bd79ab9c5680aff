"""A server without HTTP: what can be asked of its jobs, and its beginning and end."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from PIL import Image

from stg_trt.errors import StgTrtError

from .data_folder import DataFolder, is_id
from .job import Job, VideoJson
from .job_store import JobStore, Page
from .metrics import Levels, Metrics
from .refusal import Refusal, from_library
from .served_model import ServedModels
from .settings import ServerSettings
from .steps_board import StepsBoard
from .video_maker import LocalMaker, VideoMaker
from .video_request import VideoRequest
from .workers import Workers


class Service:
    """Works from `start` to `stop`; its methods may be called from any thread. `folder` is its caller's.

    It makes as many videos at a time as there are `makers`; default: one, in this process.
    """

    def __init__(
        self,
        settings: ServerSettings,
        models: ServedModels,
        folder: DataFolder,
        makers: Sequence[VideoMaker] | None = None,
    ) -> None:
        self.settings = settings
        self.models = models
        self.board = StepsBoard()
        self.metrics = Metrics()
        self.draining = False
        self.closed = False
        self.folder = folder
        self._store = JobStore(folder.database, settings.expire_s)
        makers = [LocalMaker(models, folder)] if makers is None else makers
        self.workers = Workers(makers, self._store, folder, self.board, self.metrics)

    def start(self) -> None:
        """Takes up the jobs that an earlier process left."""
        self._store.recover()
        self.expire()
        self.folder.sweep(self._store.ids(waiting=False), self._store.ids(waiting=True))
        self.workers.start()

    def drain(self, wait_s: float) -> None:
        """Refuses new jobs and waits for those that run; afterwards they go back to the queue."""
        self.draining = True
        self.workers.stop(wait_s)
        self.workers.release()
        self.closed = True
        self.board.wake()

    def stop(self) -> None:
        """The workers end within a step, and the folder is another process's to use."""
        self.drain(0)
        self.workers.join()
        self._store.close()

    @property
    def ready(self) -> bool:
        """True after the warm-up videos, until the server is told to end."""
        return self.workers.ready and not self.draining

    def create(self, request: VideoRequest, picture: Image.Image | None) -> Job:
        """A new job; raises Refusal for one that cannot be made, or not now."""
        if self.draining:
            raise Refusal(
                503,
                "The server is shutting down: try again in a moment.",
                code="shutting_down",
                headers={"Retry-After": "5"},
            )
        model = self.models.choose(request)
        try:
            resolved = model.resolve(request)
            model.check(resolved, picture)
        except StgTrtError as error:
            raise from_library(error) from error
        self._check_quota()
        id = f"video_{secrets.token_hex(16)}"
        try:
            if picture is not None:
                self.folder.save_reference(id, picture)
            job = self._store.add(
                id, resolved, picture is not None, self.settings.max_queue, self.metrics.retry_after_s
            )
        except BaseException:
            self.folder.remove_reference(id)
            raise
        self.workers.wake()
        return job

    def get(self, id: str) -> Job:
        """Raises Refusal 404 if there is no such job."""
        job = self._store.get(id) if is_id(id) else None
        if job is None:
            raise Refusal(
                404,
                f"id: expected the id of a video, got {id[:80]!r}: it may be deleted or expired",
                code="not_found",
                param="id",
            )
        return job

    def page(self, after: str | None, limit: int, *, newest_first: bool) -> Page:
        """Part of the list of jobs."""
        return self._store.page(after, limit, newest_first=newest_first)

    def cancel(self, id: str) -> Job:
        """Ends a job that waits or runs; one that has ended stays as it is."""
        job = self.get(id)
        if self._store.cancel(id):
            self.workers.interrupt(id)
            if job.status == "queued":
                self.folder.remove_reference(id)
                self.metrics.count_video(job.request.model, "cancelled", 0)
            self.board.wake()
        return self.get(id)

    def delete(self, id: str) -> None:
        """Cancels the job first, if it has not ended; then its files are gone."""
        self.cancel(id)
        self._store.delete(id)
        self.folder.remove(id)
        self.board.wake()

    def expire(self) -> None:
        """Removes results whose time is over."""
        for id in self._store.delete_expired():
            self.folder.remove(id)

    def json(self, job: Job) -> VideoJson:
        """A job as the API shows it now."""
        return job.json(self.board.progress(job.id))

    @property
    def levels(self) -> Levels:
        """The current values of the gauges."""
        counts = self._store.waiting()
        return Levels(counts["queued"], counts["in_progress"], self._store.result_bytes(), self.ready)

    def _check_quota(self) -> None:
        used, quota = self._store.result_bytes(), self.settings.quota_bytes
        if used >= quota:
            raise Refusal(
                507,
                f"disk: expected less than {quota} bytes of results, got {used}: delete videos or wait until "
                "they expire",
                code="disk_quota_exceeded",
            )
