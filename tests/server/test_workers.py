"""Several workers, whose videos other processes make: waiting for one, losing it, ending while it works."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stg_trt.runtime.server.data_folder import SUFFIXES, DataFolder
from stg_trt.runtime.server.job import Job, Result
from stg_trt.runtime.server.served_model import ServedModels
from stg_trt.runtime.server.service import Service
from stg_trt.runtime.server.settings import ServerSettings
from stg_trt.runtime.server.steps_board import StepTaken
from stg_trt.runtime.server.video_maker import MakerLost, Run
from stg_trt.runtime.server.video_request import VideoRequest
from tests.support.running_server import PROMPT, wait_for

RESULT = Result(3, "ab", 1.5, None, {"denoise": 1.0, "encode": 0.5})


class OtherProcess:
    """A maker that has a place for a video when it is told, and ends it, or is lost, when it is told."""

    def __init__(self, folder: DataFolder) -> None:
        self.folder = folder
        self.free, self.finish, self.lose = threading.Event(), threading.Event(), threading.Event()
        self.made: list[str] = []

    def warm_up(self, check: Callable[[], None]) -> None:
        pass

    def make(self, run: Run) -> Result:
        self._until(self.free, run)
        run.begin()
        run.step(StepTaken(1, 4, 1.0, 0.1, {}, None))
        self._until(self.finish, run)
        for variant in SUFFIXES:
            self.folder.save_result(run.job.id, variant, b"x")
        self.made.append(run.job.id)
        return RESULT

    def stop(self) -> None:
        pass

    def _until(self, event: threading.Event, run: Run) -> None:
        while not event.is_set():
            if self.lose.is_set():
                self.lose.clear()
                raise MakerLost("it has ended")
            run.check()
            time.sleep(0.005)


@contextmanager
def started(models: ServedModels, path: Path, makers: int) -> Iterator[tuple[Service, list[OtherProcess]]]:
    with DataFolder(path) as folder:
        processes = [OtherProcess(folder) for _ in range(makers)]
        service = Service(ServerSettings(path), models, folder, processes)
        service.start()
        try:
            yield service, processes
        finally:
            service.stop()


def create(service: Service) -> str:
    return service.create(VideoRequest(prompt=PROMPT, num_inference_steps=2), None).id


def has(service: Service, id: str, status: str) -> Callable[[], bool]:
    return lambda: service.get(id).status == status


def test_as_many_videos_at_a_time_as_makers(models: ServedModels, tmp_path: Path) -> None:
    with started(models, tmp_path, 2) as (service, processes):
        ids = [create(service) for _ in range(4)]
        time.sleep(0.1)
        # No process is free yet.
        assert {service.get(id).status for id in ids} == {"queued"}
        for process in processes:
            process.free.set()
        wait_for(lambda: all(service.board.progress(id) == 24 for id in ids[:2]))
        assert [service.get(id).status for id in ids] == ["in_progress"] * 2 + ["queued"] * 2
        assert service.json(service.get(ids[1]))["progress"] == 24 and service.levels.running == 2
        service.cancel(ids[0])
        wait_for(has(service, ids[2], "in_progress"))
        assert service.get(ids[1]).status == "in_progress" and service.board.progress(ids[1]) == 24
        for process in processes:
            process.finish.set()
        for id in ids[1:]:
            wait_for(has(service, id, "completed"))
        assert sorted(processes[0].made + processes[1].made) == sorted(ids[1:])


def test_a_job_that_waits_for_a_process_is_cancelled(models: ServedModels, tmp_path: Path) -> None:
    with started(models, tmp_path, 1) as (service, (process,)):
        waiting, other = create(service), create(service)
        time.sleep(0.05)
        service.cancel(waiting)
        process.free.set()
        process.finish.set()
        wait_for(has(service, other, "completed"))
        assert service.get(waiting).error_code == "cancelled" and process.made == [other]


@pytest.mark.parametrize("begun", [False, True], ids=["before it begins", "in the middle"])
def test_a_process_is_lost(models: ServedModels, tmp_path: Path, begun: bool) -> None:
    """The job is made by another; an attempt that had not begun is none."""
    with started(models, tmp_path, 1) as (service, (process,)):
        id = create(service)
        if begun:
            process.free.set()
            wait_for(has(service, id, "in_progress"))
        process.lose.set()
        wait_for(lambda: not process.lose.is_set())
        process.free.set()
        process.finish.set()
        wait_for(has(service, id, "completed"))
        assert service.get(id).attempts == (2 if begun else 1)
        assert service.folder.result(id, "video").exists()


def test_a_job_that_ends_every_process_is_given_up(models: ServedModels, tmp_path: Path) -> None:
    with started(models, tmp_path, 1) as (service, (process,)):
        process.free.set()
        id = create(service)
        for fence in (1, 2):
            wait_for(lambda fence=fence: _claims(service.get(id)) == fence)  # type: ignore[misc]
            process.lose.set()
            wait_for(lambda: not process.lose.is_set())
        wait_for(has(service, id, "failed"))
        assert service.get(id).error_code == "interrupted"


def test_a_drain_waits_for_begun_videos_alone(models: ServedModels, tmp_path: Path) -> None:
    with started(models, tmp_path, 2) as (service, processes):
        processes[0].free.set()
        processes[1].finish.set()
        ids = [create(service), create(service)]
        wait_for(lambda: any(service.get(id).status == "in_progress" for id in ids))
        threading.Timer(0.3, processes[0].finish.set).start()
        service.drain(60)
        assert sorted(service.get(id).status for id in ids) == ["completed", "queued"]
        assert sorted(service.get(id).attempts for id in ids) == [0, 1]


def test_a_drain_gives_back_what_takes_too_long(models: ServedModels, tmp_path: Path) -> None:
    with started(models, tmp_path, 2) as (service, processes):
        for process in processes:
            process.free.set()
        ids = [create(service), create(service)]
        for id in ids:
            wait_for(has(service, id, "in_progress"))
        service.drain(0.1)
        for id in ids:
            wait_for(has(service, id, "queued"))
            assert service.get(id).attempts == 0


def _claims(job: Job) -> int:
    return job.fence if job.status == "in_progress" else 0
