"""Two replicas of Ray Serve: videos overlap, are cancelled, and are made again if their replica is killed."""

from __future__ import annotations

import sqlite3
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import openai
import pytest

from stg_trt.runtime.server.served_model import ModelSource
from tests.support.ray_serve import RayServe, interrupt, ray_serve
from tests.support.running_server import PROMPT, wait_for

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray Serve: pip install '.[ray]'"),
    pytest.mark.slow(reason="starts a cluster of Ray"),
]
# More than a second, to be cancelled or killed in between.
STEPS = 240
GIVEN: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def serve(sources: list[ModelSource], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayServe]:
    with ray_serve(
        sources[0], tmp_path_factory.mktemp("ray") / "data", min_replicas=2, max_replicas=2
    ) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(serve: RayServe) -> bytes:
    """The video of a seed, made by the openai client as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        client = openai.OpenAI(base_url=f"{serve.http.base_url}/v1", api_key="none", max_retries=0)
        video = client.videos.create(prompt=PROMPT, extra_body={"num_inference_steps": STEPS, "seed": 7})
        done = client.videos.poll(video.id)
        assert (done.status, done.progress, done.model) == ("completed", 100, "tiny")
        content = client.videos.download_content(video.id).read()
        assert client.videos.retrieve(video.id).status == "completed"
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)
    assert content[4:8] == b"ftyp"
    return content


def create(serve: RayServe, seed: int, **fields: object) -> str:
    answer = serve.http.post("/v1/videos", json={**GIVEN, "seed": seed, **fields})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def video(serve: RayServe, id: str) -> dict[str, Any]:
    shown: dict[str, Any] = serve.http.get(f"/v1/videos/{id}").json()
    return shown


def runs(serve: RayServe, id: str, progress: int = 1) -> bool:
    shown = video(serve, id)
    assert shown["status"] in ("queued", "in_progress"), shown
    return bool(shown["status"] == "in_progress" and shown["progress"] >= progress)


def completed(serve: RayServe, id: str) -> bytes:
    wait_for(lambda: video(serve, id)["status"] in ("completed", "failed"))
    assert video(serve, id)["status"] == "completed", video(serve, id)
    return bytes(serve.http.get(f"/v1/videos/{id}/content").content)


def test_two_videos_at_a_time_and_a_cancel(serve: RayServe, undisturbed: bytes) -> None:
    """The third waits, and begins once the second is cancelled: the first, as long, is still being made."""
    first, second, third = (create(serve, seed) for seed in (7, 8, 9))
    wait_for(lambda: runs(serve, first) and runs(serve, second))
    assert video(serve, third)["status"] == "queued"
    assert serve.http.post(f"/v1/videos/{second}/cancel").json()["error"]["code"] == "cancelled"
    wait_for(lambda: runs(serve, third, progress=0))
    assert runs(serve, first) and video(serve, first)["progress"] < 90
    assert completed(serve, first) == undisturbed != completed(serve, third)
    assert video(serve, second)["error"]["code"] == "cancelled"


def test_events_of_a_replicas_steps(serve: RayServe) -> None:
    id = create(serve, 4, num_inference_steps=5)
    events = serve.http.get(f"/v1/videos/{id}/events").text
    assert events.count("event: step\n") == 5 and '"preview": "data:image/webp' in events
    assert events.count("event: completed\n") == 1


def test_a_killed_replica(serve: RayServe, undisturbed: bytes) -> None:
    id = create(serve, 7)
    wait_for(lambda: runs(serve, id, progress=5))
    busy = max(serve.processes("VideoReplica"), key=lambda process: process.cpu_percent(0.2))
    assert runs(serve, id)
    busy.kill()
    assert completed(serve, id) == undisturbed
    metrics = serve.http.get("/metrics").text
    assert 'stg_trt_videos_total{model="tiny",outcome="retried"} 1.0' in metrics


def test_a_client_that_leaves_cancels_its_sync(serve: RayServe) -> None:
    with pytest.raises(Exception, match="timed out"):
        serve.http.post("/v1/videos/sync", json=GIVEN, timeout=1)
    (shown,) = serve.http.get("/v1/videos?limit=1").json()["data"]
    wait_for(lambda: video(serve, shown["id"])["status"] == "failed")
    assert video(serve, shown["id"])["error"]["code"] == "cancelled"


def test_the_end_waits_for_what_runs(serve: RayServe) -> None:
    """The last one with the application, which it ends."""
    first = create(serve, 5)
    wait_for(lambda: runs(serve, first))
    assert interrupt(serve) == 0
    with sqlite3.connect(serve.log.parent / "data/jobs.sqlite3") as jobs:
        status = jobs.execute("SELECT status, attempts FROM videos WHERE id = ?", (first,)).fetchone()
    assert status == ("completed", 1)
