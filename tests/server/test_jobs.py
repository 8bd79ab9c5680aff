"""The queue, its limits, and what ends a job: cancel, delete, errors, expiry, the server's end."""

from __future__ import annotations

import base64
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import httpx2
import pytest
import uvicorn

from stg_trt.errors import InvalidRequest, OutOfDeviceMemory, RankLost
from stg_trt.runtime.server.app import create_app
from stg_trt.runtime.server.data_folder import DataFolder
from stg_trt.runtime.server.process import listen, url_of
from stg_trt.runtime.server.served_model import ModelSource, ServedModel, ServedModels
from tests.support.running_server import ENDLESS, PROMPT, Running, png, refused, running, wait_for

GIVEN = {"prompt": PROMPT, "num_inference_steps": ENDLESS}


@pytest.fixture
def wide(models: ServedModels) -> ServedModels:
    """One of the two models, whose solver's table is made at once."""
    return ServedModels([models.get("wide")])


def test_cancel_ends_a_run(server: Running) -> None:
    id = server.create(**GIVEN)
    wait_for(lambda: server.steps(id) >= 3)
    shown = server.video(id)
    assert shown["status"] == "in_progress" and shown["progress"] == 99 * server.steps(id) // ENDLESS
    cancelled = server.http.post(f"/v1/videos/{id}/cancel").json()
    assert cancelled["status"] == "failed" and cancelled["error"]["code"] == "cancelled"
    other = server.create(model="small")
    assert server.finished(other)["status"] == "completed"
    assert server.video(id) == cancelled
    assert server.http.post(f"/v1/videos/{other}/cancel").json()["status"] == "completed"


def test_the_step_after_a_cancel_is_the_last(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    begin = server.service.board.begin

    def recorded(worker: int, job: str) -> None:
        if begun:
            begun.append(f"{server.steps(begun[0])} steps")
        begun.append(job)
        begin(worker, job)

    monkeypatch.setattr(server.service.board, "begin", recorded)
    id = server.create(**GIVEN)
    wait_for(lambda: server.steps(id) >= 2)
    server.http.post(f"/v1/videos/{id}/cancel")
    at_most = server.steps(id) + 1
    next_one = server.create(model="small")
    server.finished(next_one)
    assert begun[0] == id and begun[2] == next_one
    assert int(begun[1].split()[0]) <= at_most


def test_delete_ends_a_run_and_leaves_no_file(server: Running) -> None:
    id = server.create(**GIVEN)
    wait_for(lambda: server.steps(id) >= 1)
    assert server.http.delete(f"/v1/videos/{id}").json()["deleted"]
    refused(server.http.get(f"/v1/videos/{id}"), 404, "not_found", "id")
    other = server.create(model="small")
    server.finished(other)
    kept = {path.stem for path in server.service.folder.result(other, "video").parent.iterdir()}
    assert other in kept and id not in kept


def test_a_full_queue(wide: ServedModels, tmp_path: Path) -> None:
    with running(wide, tmp_path, max_queue=2) as server:
        first = server.create(**GIVEN)
        wait_for(lambda: server.steps(first) >= 1)
        waiting = [server.create() for _ in range(2)]
        answer = server.http.post("/v1/videos", json=GIVEN)
        assert "expected fewer than 2 waiting videos" in refused(answer, 429, "queue_full")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        shown = server.http.get(f"/v1/videos/{waiting[0]}")
        assert shown.json()["status"] == "queued"
        assert 100 <= int(shown.headers["openai-poll-after-ms"]) <= 5000
        server.http.post(f"/v1/videos/{waiting[0]}/cancel")
        server.create()
        server.http.delete(f"/v1/videos/{first}")
        assert server.finished(waiting[1])["status"] == "completed"
        assert server.video(waiting[0])["error"]["code"] == "cancelled"


def test_quota_and_expiry(wide: ServedModels, tmp_path: Path) -> None:
    with running(wide, tmp_path, quota_gib=1e-9, expire_hours=2 / 3600) as server:
        id = server.create()
        assert server.finished(id)["expires_at"] == server.video(id)["completed_at"] + 2
        assert "delete videos or wait" in refused(
            server.http.post("/v1/videos", json=GIVEN), 507, "disk_quota_exceeded"
        )
        file = server.service.folder.result(id, "video")
        assert file.exists()
        wait_for(lambda: server.http.get(f"/v1/videos/{id}").status_code == 404, 10)
        assert server.http.get("/v1/videos").json()["data"] == []
        wait_for(lambda: not file.exists(), 10)
        server.create()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory", "fewer frames"),
        (OutOfDeviceMemory("GPU memory: expected room"), "out_of_memory", "GPU memory: expected room"),
        (MemoryError(), "out_of_memory", "smaller size"),
        (RankLost("guidance_parallel: got the end of one"), "gpu_lost", "got the end of one"),
        (OSError(28, "No space left on device"), "disk_full", "no free disk space"),
        (ZeroDivisionError("secret"), "internal_error", "an error of its own"),
    ],
    ids=["CPU", "GPU", "Python", "lost rank", "disk", "defect"],
)
def test_errors_of_a_run(
    server: Running, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str, message: str
) -> None:
    def decode(*arguments: object, **options: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(server.service.models.get("small").pipeline.components, "decode", decode)
        video = server.finished(server.create(model="small"))
    assert video["status"] == "failed" and video["error"]["code"] == code
    assert message in video["error"]["message"] and "secret" not in video["error"]["message"]
    assert server.finished(server.create(model="small"))["status"] == "completed"
    answer = server.http.get(f"/v1/videos/{video['id']}/content")
    refused(answer, 404, "video_failed", "id")


def test_a_result_that_cannot_be_written_down(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job, with its picture, is taken up again when the database can be written."""
    full = sqlite3.OperationalError("database or disk is full")
    with monkeypatch.context() as patched:
        for name in ("complete", "fail", "retry"):
            patched.setattr(server.service._store, name, mock.Mock(side_effect=full))
        url = f"data:image/png;base64,{base64.b64encode(png(160, 128)).decode()}"
        id = server.create(input_reference=url)
        wait_for(lambda: server.service._store.retry.called)  # type: ignore[attr-defined]
        assert server.video(id)["status"] == "in_progress"
    assert server.finished(id)["status"] == "completed"
    assert server.service.get(id).attempts == 2


def test_a_gpu_that_is_lost_ends_the_worker(
    wide: ServedModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")

    def decode(*arguments: object, **options: object) -> None:
        raise error

    with running(wide, tmp_path) as server, monkeypatch.context() as patched:
        patched.setattr(wide.get("wide").pipeline.components, "decode", decode)
        id = server.create()
        wait_for(server.service.workers.ended.is_set)
        assert server.service.workers.failure is error and not server.service.ready
        assert server.video(id)["status"] == "in_progress"
    with running(wide, tmp_path) as server:
        assert server.finished(id)["status"] == "completed"


def test_nan_is_no_video(server: Running) -> None:
    video = server.finished(server.create(guidance_scale=3e38, stg_scale=3e38))
    assert video["error"]["code"] == "not_finite" and "got NaN or infinity" in video["error"]["message"]
    assert server.finished(server.create(model="small"))["status"] == "completed"


def test_keys(wide: ServedModels, tmp_path: Path) -> None:
    with running(wide, tmp_path, ready=False, api_key=("first", "sec\u00f6nd")) as server:
        for header in ({}, {"authorization": "Bearer third"}, {"authorization": "first"},
                       {"authorization": "Bearer "}, {"authorization": "Basic first"}):  # fmt: skip
            for path in ("/v1/videos", "/v1/models", "/metrics", "/v1/nothing"):
                answer = server.http.get(path, headers=header)
                refused(answer, 401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
        for key in (b"first", "sec\u00f6nd".encode()):
            headers: Any = {b"authorization": b"Bearer " + key}
            assert server.http.get("/v1/videos", headers=headers).status_code == 200
        assert server.http.get("/health/live").status_code == 200


def test_pages_of_other_servers(server: Running) -> None:
    """A page that someone opens in a browser on the server's machine could post a form to it."""
    for origin in ("https://example.com", "null", "http://[broken"):
        answer = server.http.post("/v1/videos", data={"prompt": "a fox"}, headers={"origin": origin})
        refused(answer, 403, "wrong_origin")
    own = {"origin": str(server.http.base_url).rstrip("/")}
    assert server.http.get("/v1/videos", headers=own).status_code == 200


def test_ready_only_after_a_warm_up(wide: ServedModels, tmp_path: Path, monkeypatch: Any) -> None:
    generate = ServedModel.generate
    may_go_on: list[bool] = []

    def waits(*arguments: Any) -> Any:
        wait_for(lambda: bool(may_go_on))
        return generate(*arguments)

    monkeypatch.setattr(ServedModel, "generate", waits)
    with running(wide, tmp_path, ready=False) as server:
        assert server.http.get("/health/ready").status_code == 503
        assert server.http.get("/health/live").status_code == 200
        early = server.create()
        assert server.video(early)["status"] == "queued"
        may_go_on.append(True)
        wait_for(lambda: server.http.get("/health/ready").status_code == 200)
        assert server.finished(early)["status"] == "completed"


def test_a_warm_up_that_fails_ends_the_worker(
    wide: ServedModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise OutOfDeviceMemory("GPU memory: expected room")

    monkeypatch.setattr(ServedModel, "generate", fails)
    with running(wide, tmp_path, ready=False) as server:
        wait_for(server.service.workers.ended.is_set)
        assert isinstance(server.service.workers.failure, OutOfDeviceMemory)
        assert server.http.get("/health/ready").status_code == 503
        wait_for(lambda: server.http.get("/health/live").status_code == 503)


def test_a_drained_job_waits_for_the_next_start(wide: ServedModels, tmp_path: Path) -> None:
    with running(wide, tmp_path) as server:
        id = server.create(**GIVEN)
        wait_for(lambda: server.steps(id) >= 1)
        start = time.monotonic()
        server.service.drain(0.1)
        assert time.monotonic() - start < 5
        refused(server.http.post("/v1/videos", json=GIVEN), 503, "shutting_down")
        assert server.http.get("/health/ready").json() == {"status": "draining"}
        wait_for(lambda: server.video(id)["status"] == "queued")
    with running(wide, tmp_path) as server:
        wait_for(lambda: server.steps(id) >= 1)
        assert server.service.get(id).attempts == 1
        server.http.delete(f"/v1/videos/{id}")


def test_sync_ends_with_the_server(wide: ServedModels, tmp_path: Path) -> None:
    with running(wide, tmp_path) as server:
        blocking = server.create(**GIVEN)
        wait_for(lambda: server.steps(blocking) >= 1)
        server.service.drain(0)
        events = server.http.get(f"/v1/videos/{blocking}/events")
        assert "event: step" in events.text and "event: completed" not in events.text


def test_a_client_that_leaves_cancels_its_sync(wide: ServedModels, tmp_path: Path) -> None:
    with running(wide, tmp_path) as server, listen("127.0.0.1", 0) as listening:
        web = uvicorn.Server(uvicorn.Config(create_app(server.service), log_config=None))
        thread = threading.Thread(target=web.run, args=([listening],))
        thread.start()
        try:
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(f"{url_of(listening)}/v1/videos/sync", json=GIVEN, timeout=1)
            (video,) = server.http.get("/v1/videos").json()["data"]
            assert server.finished(video["id"])["error"]["code"] == "cancelled"
        finally:
            web.should_exit = True
            thread.join()


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    with DataFolder(tmp_path), pytest.raises(InvalidRequest, match="data: expected a folder that no other"):
        DataFolder(tmp_path)
    with DataFolder(tmp_path):
        pass


def test_engines_of_several_folders(sources: list[ModelSource], tmp_path: Path) -> None:
    """A folder of builds and one build, of two models, of which one is asked for."""
    wide, other = sources
    one_build = next(path.parent for path in other.engines[0].glob("*/manifest.json"))
    source = ModelSource("both", other.checkpoint, (*wide.engines, one_build))
    model = ServedModel.open(source)
    assert [size.pixels for size in model.sizes] == ["64x48"]
