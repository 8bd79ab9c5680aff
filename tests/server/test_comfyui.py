"""The requests of ComfyUI's nodes for such servers, in their order and spelling, to a server's process.

Sources: comfy_api_nodes/nodes_sora.py of ComfyUI, and apps/ComfyUI-vLLM-Omni of vllm-omni.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx2
import pytest

from stg_trt.runtime.server.served_model import ModelSource
from tests.support.running_server import PROMPT, png, served

pytestmark = pytest.mark.slow(reason="starts a server")


@pytest.fixture(scope="module")
def client(sources: list[ModelSource], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    with served(sources[0], tmp_path_factory.mktemp("comfyui")) as (_, found):
        yield found


def polled(client: httpx2.Client, video: dict[str, Any]) -> bytes:
    """The file of a video, once its status is one that ends the nodes' polling."""
    while video["status"] not in ("completed", "failed"):
        time.sleep(0.1)
        video = client.get(f"/v1/videos/{video['id']}").raise_for_status().json()
    assert video["status"] == "completed", video
    return client.get(f"/v1/videos/{video['id']}/content").raise_for_status().content


def frames_in(data: bytes) -> tuple[int, int, int]:
    """Width, height and number of an MP4's frames, as ComfyUI's video output reads them."""
    with av.open(io.BytesIO(data)) as container:
        frames = [*container.decode(video=0)]
    return frames[0].width, frames[0].height, len(frames)


def test_the_node_of_sora(client: httpx2.Client) -> None:
    form = {"prompt": PROMPT, "model": "sora-2", "seconds": "1", "size": "160x128"}
    picture = {"input_reference": ("image.png", png(160, 128), "image/png")}
    for files in (None, picture):
        # The form is multipart without a picture too.
        sent: dict[str, Any] = files or {"prompt": (None, PROMPT)}
        fields = {name: text for name, text in form.items() if name not in sent}
        created = client.post("/v1/videos", data=fields, files=sent).raise_for_status().json()
        assert created["error"] is None
        assert frames_in(polled(client, created)) == (160, 128, 17)


def test_the_node_of_vllm_omni(client: httpx2.Client, tmp_path: Path) -> None:
    listed = client.get("/v1/models", headers={"Content-Type": "application/json"}).raise_for_status().json()
    assert "tiny" in [model["id"] for model in listed["data"]]
    sizes = {"width": "160", "height": "128", "num_frames": "17", "fps": "8"}
    sampling = {"n": "1", "num_inference_steps": "2", "guidance_scale": "3.0", "seed": "42"}
    tiling = {"vae_use_slicing": "False", "vae_use_tiling": "False"}
    form = {"model": "tiny", "prompt": PROMPT, **sizes, "negative_prompt": "blurry", **sampling, **tiling}
    picture = {"input_reference": ("image.png", png(160, 128), "image/png")}
    created = client.post("/v1/videos", data=form, files=picture).raise_for_status().json()
    assert created["status"] in ("queued", "in_progress")
    assert frames_in(polled(client, created)) == (160, 128, 17)
    place = f"/v1/videos/{created['id']}"
    assert client.delete(place).raise_for_status().json()["deleted"] is True
    assert client.get(place).status_code == 404
