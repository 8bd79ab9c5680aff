"""The page in a real browser, over a server of two tiny models."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from stg_trt.runtime.server.app import create_app
from stg_trt.runtime.server.served_model import ServedModels
from tests.support.running_server import ENDLESS, PROMPT, Running, png, running, wait_for

_CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_NEEDED = "needs playwright and Chromium, which `make browser` installs"
sync_api = pytest.importorskip("playwright.sync_api", reason=_NEEDED)
pytestmark = pytest.mark.skipif(_CHROMIUM is None, reason=_NEEDED)
KEY = "a secret"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def server(models: ServedModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(models, tmp_path_factory.mktemp("page"), api_key=(KEY,)) as started:
        started.http.headers["authorization"] = f"Bearer {KEY}"
        yield started


@pytest.fixture(scope="module")
def address(server: Running) -> Iterator[str]:
    config = uvicorn.Config(create_app(server.service), port=0, log_config=None, lifespan="off")
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run)
    thread.start()
    wait_for(lambda: web.started)
    port = web.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    web.should_exit = True
    thread.join()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """With the key; nothing may be written to its console as an error."""
    shown = browser.new_page()
    errors: list[str] = []
    shown.on("pageerror", lambda error: errors.append(str(error)))
    shown.goto(address)
    sync_api.expect(shown.get_by_role("status").first).to_contain_text("The API key is missing or wrong")
    shown.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    shown.get_by_label("API key").fill(KEY)
    shown.get_by_label("API key").blur()
    sync_api.expect(shown.get_by_label("Model").locator("option")).to_have_count(2)
    yield shown
    shown.close()
    assert errors == []


def ask(page: Any, **fields: str) -> None:
    for label, value in fields.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(value)
    page.get_by_role("button", name="Make video").click()


def test_a_video_with_and_without_stg_plays(page: Any, server: Running) -> None:
    page.get_by_label("Also without STG").check()
    ask(page, Prompt=PROMPT, Steps="4", STG_scale="1", Seed="7")
    runs = page.get_by_label("Videos being made").get_by_role("article")
    sync_api.expect(runs).to_have_count(2)
    for place, title in enumerate(("With STG, seed 7", "Without STG, seed 7")):
        run = runs.nth(place)
        sync_api.expect(run.get_by_role("heading")).to_have_text(title)
        sync_api.expect(run.get_by_role("status")).to_contain_text("made in", timeout=60_000)
        sync_api.expect(run.get_by_role("img", name="Distance")).to_be_visible()
        video = run.locator("video")
        page.wait_for_function("video => video.currentTime > 0", arg=video.element_handle())
        width, height = video.evaluate("video => [video.videoWidth, video.videoHeight]")
        assert (width, height) == (160, 128)
        box, screen = video.bounding_box(), run.locator(".screen").bounding_box()
        assert box == screen, "the video is shown whole, in its screen"
    assert "|cond - skip|" in runs.first.inner_text() and "skip" not in runs.last.inner_text()
    made = [one.request.stg_scale for one in server.service.page(None, 2, newest_first=False).jobs]
    assert made == [1.0, 0.0]
    history = page.get_by_role("list", name="History").get_by_role("button")
    sync_api.expect(history).to_have_count(2)
    history.first.click()
    sync_api.expect(runs).to_have_count(1)
    sync_api.expect(runs.get_by_role("status")).to_contain_text("made in")


def test_the_preview_changes_until_it_is_stopped(page: Any, server: Running) -> None:
    ask(page, Prompt=PROMPT, Steps=str(ENDLESS))
    preview = page.get_by_role("img", name="Preview")
    seen: set[str] = set()
    while len(seen) < 4:
        sync_api.expect(preview).to_be_visible()
        seen.add(preview.get_attribute("src"))
    assert all(url.startswith("data:image/webp;base64,") for url in seen)
    size = preview.evaluate(
        "async image => { await image.decode(); return [image.naturalWidth, image.naturalHeight] }"
    )
    assert size == [5, 4]
    page.get_by_role("button", name="Stop").click()
    status = page.get_by_label("Videos being made").get_by_role("status")
    sync_api.expect(status).to_have_text("The video was cancelled.")
    sync_api.expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    assert server.service.levels.running == server.service.levels.queued == 0


def test_a_picture_and_refusals(page: Any, server: Running, tmp_path: Path) -> None:
    picture = tmp_path / "red.png"
    picture.write_bytes(png(160, 128))
    page.get_by_label("Picture").set_input_files(picture)
    ask(page, Prompt=PROMPT, Steps="3")
    status = page.get_by_label("Videos being made").get_by_role("status")
    sync_api.expect(status).to_contain_text("made in", timeout=60_000)
    assert server.service.page(None, 1, newest_first=True).jobs[0].has_reference


def test_the_keyboard_is_enough(page: Any) -> None:
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.type(PROMPT)
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.type("3")
    page.keyboard.press("Enter")
    status = page.get_by_label("Videos being made").get_by_role("status")
    sync_api.expect(status).to_contain_text("made in", timeout=60_000)
