"""A server inside the test's process or in one of its own, and what its tests ask of it."""

from __future__ import annotations

import io
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from fastapi.testclient import TestClient
from PIL import Image

from stg_trt.runtime.server.app import create_app
from stg_trt.runtime.server.data_folder import DataFolder
from stg_trt.runtime.server.served_model import ModelSource, ServedModels
from stg_trt.runtime.server.service import Service
from stg_trt.runtime.server.settings import ServerSettings
from stg_trt.runtime.server.steps_board import StepTaken
from tests.support.cli import start

# Some words of the tiny checkpoints' tokenizers.
PROMPT = "a red circle moving left"
STEPS = 3
# Steps of a job that does not end by itself within a test: each of them takes a twentieth of a second.
ENDLESS = 200
_STEP_S = 0.05
_KEY = {"authorization": "Bearer secret"}
WAIT_S = 120.0


@dataclass(frozen=True)
class Running:
    """A started service and a client of its application."""

    service: Service
    http: TestClient

    def create(self, **fields: object) -> str:
        """A video of a few steps; returns its id."""
        given = {"prompt": PROMPT, "seed": 7, "num_inference_steps": STEPS, **fields}
        answer = self.http.post("/v1/videos", json=given)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def video(self, id: str) -> dict[str, Any]:
        """A job as it is now."""
        answer = self.http.get(f"/v1/videos/{id}")
        assert answer.status_code == 200, answer.text
        shown: dict[str, Any] = answer.json()
        return shown

    def finished(self, id: str) -> dict[str, Any]:
        """A job at its end."""
        wait_for(lambda: self.video(id)["status"] in ("completed", "failed"))
        return self.video(id)

    def content(self, id: str) -> bytes:
        """The MP4 of a job, once it is completed."""
        assert self.finished(id)["status"] == "completed", self.video(id)
        return bytes(self.http.get(f"/v1/videos/{id}/content").content)

    def steps(self, id: str) -> int:
        """How many steps a running job has taken."""
        return len(self.service.board.steps(id))


@contextmanager
def running(models: ServedModels, folder: Path, *, ready: bool = True, **settings: Any) -> Iterator[Running]:
    """A server that has made its warm-up videos, unless `ready` is False; it ends with the block."""
    with DataFolder(folder) as held:
        service = Service(ServerSettings(folder, **settings), models, held)
        add = service.board.add

        def add_slowly(worker: int, step: StepTaken) -> None:
            add(worker, step)
            time.sleep(_STEP_S if step.steps == ENDLESS else 0)

        service.board.add = add_slowly  # type: ignore[method-assign]
        service.start()
        try:
            with TestClient(create_app(service)) as client:
                if ready:
                    wait_for(lambda: service.ready)
                yield Running(service, client)
        finally:
            service.stop()


@contextmanager
def served(source: ModelSource, data: Path) -> Iterator[tuple[subprocess.Popen[str], httpx2.Client]]:
    """A process and a client with its key; the process is killed at the end."""
    options = ("--data", data, "--port=0", "--api-key=secret", "--model-name=tiny")
    process = start("serve", source.checkpoint, "--engines", source.engines[0], *options)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"Serving tiny on (http://127\.0\.0\.1:\d+)\n", line)
        assert found, line + process.communicate()[1]
        with httpx2.Client(base_url=found[1], headers=_KEY, timeout=60) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Until it is true; fails the test after the time."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def refused(answer: Any, status: int, code: str, param: str | None = None) -> str:
    """Checks a refusal in the form of OpenAI's errors, and returns its message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"].startswith("req_")
    (error,) = answer.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param), error
    return str(error["message"])


def png(width: int, height: int, colour: str = "red") -> bytes:
    """A picture of one colour."""
    data = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(data, "PNG")
    return data.getvalue()
