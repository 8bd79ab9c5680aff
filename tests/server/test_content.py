"""Results as players and programs fetch them: ranges, tags, events, and videos that are waited for."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.running_server import ENDLESS, PROMPT, STEPS, Running, refused, wait_for


@pytest.fixture(scope="module")
def made(server: Running) -> str:
    """A completed video."""
    id = server.create(model="small")
    assert server.finished(id)["status"] == "completed"
    return id


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-99", slice(0, 100)),
        ("bytes=100-", slice(100, None)),
        ("bytes=-50", slice(-50, None)),
        ("bytes=10-999999999", slice(10, None)),
    ],
)
def test_a_range(server: Running, made: str, asked: str, part: slice) -> None:
    whole = server.content(made)
    answer = server.http.get(f"/v1/videos/{made}/content", headers={"range": asked})
    start, stop, _ = part.indices(len(whole))
    assert answer.status_code == 206 and answer.content == whole[part]
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"
    assert answer.headers["content-length"] == str(stop - start)


@pytest.mark.parametrize("asked", ["bytes=0-9,20-29", "lines=1-2", "bytes=9-5", "bytes=-", "bytes=a-b"])
def test_what_is_no_single_range_gets_the_whole(server: Running, made: str, asked: str) -> None:
    answer = server.http.get(f"/v1/videos/{made}/content", headers={"range": asked})
    assert answer.status_code == 200 and answer.content == server.content(made)


@pytest.mark.parametrize("asked", ["bytes=999999999-", "bytes=-0"])
def test_a_range_beyond_the_end(server: Running, made: str, asked: str) -> None:
    answer = server.http.get(f"/v1/videos/{made}/content", headers={"range": asked})
    refused(answer, 416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(server.content(made))}"


def test_tags(server: Running, made: str) -> None:
    path = f"/v1/videos/{made}/content"
    whole = server.http.get(path)
    tag = whole.headers["etag"]
    assert whole.headers["content-type"] == "video/mp4" and whole.headers["accept-ranges"] == "bytes"
    assert server.http.get(path, headers={"if-none-match": tag}).status_code == 304
    first = {"range": "bytes=0-9"}
    assert server.http.get(path, headers={**first, "if-range": tag}).status_code == 206
    assert server.http.get(path, headers={**first, "if-range": '"old"'}).content == whole.content
    head = server.http.head(path)
    assert head.status_code == 200 and head.headers["content-length"] == str(len(whole.content))
    assert server.http.get(path, params={"variant": "thumbnail"}).headers["etag"] != tag


def test_other_variants_are_refused(server: Running, made: str) -> None:
    answer = server.http.get(f"/v1/videos/{made}/content", params={"variant": "gif"})
    assert "'video', 'thumbnail' or 'spritesheet'" in refused(answer, 400, "invalid_value", "variant")


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events."""
    lines = [event.split("\n") for event in text.strip().split("\n\n") if not event.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]


def test_events(server: Running) -> None:
    id = server.create(num_inference_steps=5)
    answer = server.http.get(f"/v1/videos/{id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    *steps, (last, video) = events_of(answer.text)
    assert [name for name, _ in steps] == ["step"] * 5
    assert [(data["step"], data["steps"]) for _, data in steps] == [(i, 5) for i in range(1, 6)]
    assert [data["progress"] for _, data in steps] == [19, 39, 59, 79, 99]
    levels = [data["sigma"] for _, data in steps]
    assert levels == sorted(levels, reverse=True) and levels[0] == 1.0
    assert all(data["seconds"] > 0 for _, data in steps)
    assert (last, video) == ("completed", server.video(id))


def test_events_of_a_video_that_is_deleted(server: Running) -> None:
    running = server.create(num_inference_steps=ENDLESS)
    waiting = server.create()
    wait_for(lambda: server.steps(running) > 0)
    assert server.http.delete(f"/v1/videos/{waiting}").status_code == 200
    refused(server.http.get(f"/v1/videos/{waiting}/events"), 404, "not_found", "id")
    assert server.http.post(f"/v1/videos/{running}/cancel").json()["status"] == "failed"
    *_, (last, video) = events_of(server.http.get(f"/v1/videos/{running}/events").text)
    assert (last, video["error"]["code"]) == ("failed", "cancelled")


def test_sync_waits_for_the_video(server: Running, made: str) -> None:
    given = {"prompt": PROMPT, "model": "small", "seed": 7, "num_inference_steps": STEPS}
    answer = server.http.post("/v1/videos/sync", json=given)
    assert answer.headers["content-type"] == "video/mp4" and answer.content == server.content(made)
    assert server.video(answer.headers["x-video-id"])["status"] == "completed"
    too_long = server.http.post("/v1/videos/sync", json={**given, "prompt": f"{PROMPT} " * 9})
    assert "expected at most 9 tokens" in refused(too_long, 400, "invalid_value", "prompt")


def test_stages_are_the_whole_time(server: Running) -> None:
    """Of a video that takes seconds, so that a busy machine's pauses are small beside it."""
    video = server.finished(server.create(model="small", num_inference_steps=150))
    assert {"denoise", "decode", "encode"} <= video["stages"].keys()
    assert 0.98 <= sum(video["stages"].values()) / video["inference_time_s"] <= 1.02


def test_pages(server: Running) -> None:
    made = [server.create(model="small") for _ in range(3)]
    for id in made:
        server.finished(id)

    def page(**asked: object) -> dict[str, Any]:
        answer: dict[str, Any] = server.http.get("/v1/videos", params=asked).json()  # type: ignore[arg-type]
        assert answer["object"] == "list"
        return answer

    first = page(limit=1)
    assert (first["first_id"], first["last_id"], first["has_more"]) == (made[2], made[2], True)
    assert [video["id"] for video in page(after=made[2], limit=2)["data"]] == [made[1], made[0]]
    assert [video["id"] for video in page(after=made[0], order="asc")["data"]] == made[1:]
    assert page(after=made[2], order="asc") == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip
    for name, value in (("limit", "0"), ("limit", "101"), ("limit", "x"), ("order", "up"), ("after", "x")):
        refused(server.http.get("/v1/videos", params={name: value}), 400, "invalid_value", name)


def test_unknown_addresses(server: Running) -> None:
    refused(server.http.get("/v1/nothing"), 404, "not_found")
    refused(server.http.put("/v1/videos"), 405, "method_not_allowed")
    refused(server.http.get("/v1/models/none"), 404, "model_not_found", "model")


def test_metrics(server: Running, made: str) -> None:
    text = server.http.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['stg_trt_videos_total{model="small",outcome="completed"}']) >= 1
    assert float(lines['stg_trt_step_seconds_count{model="small"}']) >= STEPS
    for stage in server.video(made)["stages"]:
        assert float(lines[f'stg_trt_stage_seconds_count{{model="small",stage="{stage}"}}']) >= 1
    assert float(lines["stg_trt_result_bytes"]) > len(server.content(made))
    assert lines["stg_trt_ready"] == "1.0" and lines["stg_trt_videos_running"] == "0.0"
    route = 'method="GET",route="/v1/videos/{id}",status="200"'
    assert float(lines[f"stg_trt_http_requests_total{{{route}}}"]) >= 1
    assert made not in text
