"""The openai package as it is installed: every call of client.videos that the server has."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from stg_trt.runtime.server.served_model import ModelSource
from tests.support.cli import invoke
from tests.support.running_server import PROMPT, STEPS, Running, png

PLAIN = {"num_inference_steps": STEPS, "seed": 7}


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.http.base_url}/v1", api_key="none", http_client=server.http, max_retries=0
    )


@pytest.fixture(autouse=True)
def only_deprecations() -> Iterator[None]:
    """OpenAI has deprecated its video API; no other warning may appear."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def test_a_video_is_that_of_the_command_line(
    client: openai.OpenAI, sources: list[ModelSource], tmp_path: Path
) -> None:
    video = client.videos.create(prompt=PROMPT, extra_body={**PLAIN, "stg_scale": 1.5, "stg_blocks": [1]})
    assert video.status in ("queued", "in_progress", "completed") and video.object == "video"
    done = client.videos.poll(video.id)
    assert (done.status, done.progress, done.error, done.prompt) == ("completed", 100, None, PROMPT)
    assert (done.model, done.size, done.seconds) == ("wide", "160x128", "0.68")
    assert done.completed_at is not None and done.expires_at == done.completed_at + 24 * 3600
    got = client.videos.download_content(video.id).read()

    wide, output = sources[0], tmp_path / "video.mp4"
    options = ("--prompt", PROMPT, "--seed=7", f"--num-inference-steps={STEPS}", "--stg-scale=1.5")
    made = invoke("generate", wide.checkpoint, "--engines", wide.engines[0], "--output", output, *options)
    assert made.returncode == 0, made.stderr
    assert got == output.read_bytes()


def test_create_and_poll_with_a_picture(client: openai.OpenAI) -> None:
    shared = {"prompt": PROMPT, "extra_body": PLAIN}
    videos = [
        client.videos.create_and_poll(input_reference=picture, **shared)  # type: ignore[arg-type]
        for picture in (png(160, 128, "red"), ("sky.png", png(160, 128, "blue"), "image/png"))
    ]
    assert [video.status for video in videos] == ["completed", "completed"]
    red, blue = (client.videos.download_content(video.id).read() for video in videos)
    assert red[4:8] == blue[4:8] == b"ftyp" and red != blue


def test_variants(client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(prompt=PROMPT, model="small", extra_body=PLAIN)  # type: ignore[arg-type]
    thumbnail = client.videos.download_content(video.id, variant="thumbnail")
    sheet = client.videos.download_content(video.id, variant="spritesheet")
    assert thumbnail.response.headers["content-type"] == "image/webp" and thumbnail.read()[8:12] == b"WEBP"
    assert sheet.response.headers["content-type"] == "image/jpeg" and sheet.read()[:2] == b"\xff\xd8"


def test_list_and_delete(client: openai.OpenAI) -> None:
    made = [client.videos.create(prompt=PROMPT, extra_body=PLAIN).id for _ in range(3)]
    for id in made:
        client.videos.poll(id)
    page = client.videos.list(limit=2)
    assert [video.id for video in page.data] == made[:0:-1] and page.has_more
    assert next(video.id for video in page.get_next_page().data) == made[0]
    rising = [video.id for video in client.videos.list(order="asc", limit=1)]
    assert rising[-3:] == made
    for id in made:
        deleted = client.videos.delete(id)
        assert (deleted.id, deleted.deleted, deleted.object) == (id, True, "video.deleted")
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(id)


def test_a_failed_video_is_an_answer(client: openai.OpenAI) -> None:
    """The client would raise for a status of HTTP, and try again."""
    overflow = {"guidance_scale": 3e38, "stg_scale": 3e38}
    video = client.videos.create_and_poll(prompt=PROMPT, extra_body={**PLAIN, **overflow})
    assert video.status == "failed" and video.error is not None
    assert video.error.code == "not_finite" and "got NaN or infinity" in video.error.message


def test_refusals_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="1280x720") as caught:
        client.videos.create(prompt=PROMPT, size="1280x720")
    assert caught.value.param == "size" and caught.value.code == "invalid_value"
    assert caught.value.request_id is not None
    with pytest.raises(openai.BadRequestError, match="prompt: expected at most 9 tokens, got") as caught:
        client.videos.create(prompt=f"{PROMPT} " * 9)
    assert caught.value.param == "prompt"
    with pytest.raises(openai.NotFoundError, match="model: expected one of wide, small, got 'big'"):
        client.videos.create(prompt=PROMPT, model="big")
    video = client.videos.create(prompt=PROMPT, extra_body={**PLAIN, "num_inference_steps": 200})
    with pytest.raises(openai.ConflictError, match="ask for it when its status is completed"):
        client.videos.download_content(video.id)
    client.videos.delete(video.id)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["wide", "small"]
    small = client.models.retrieve("small").model_dump()
    assert small["sizes"] == [{"size": "64x48", "num_frames": 9, "seconds": "0.56"}]
