"""litellm and NVIDIA's AIPerf, unmodified, in an environment of their own: `make clients` installs them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from stg_trt.runtime.server.served_model import ModelSource
from tests.support.cli import ROOT
from tests.support.running_server import PROMPT, served

BIN = ROOT / ".clients" / "bin"
NEEDED = "needs litellm and aiperf, which `make clients` installs"
pytestmark = [
    pytest.mark.skipif(not (BIN / "aiperf").exists(), reason=NEEDED),
    pytest.mark.slow(reason="starts a server and other programs"),
]
LITELLM = """
import json, sys, time
import litellm

at = {"api_base": sys.argv[1], "api_key": "secret"}
sizes = {"seconds": "1", "size": "160x128"}
video = litellm.video_generation(prompt=sys.argv[2], model="openai/tiny", **sizes, **at)
of = {"video_id": video.id, "custom_llm_provider": "openai", **at}
while (status := litellm.video_status(**of).status) not in ("completed", "failed"):
    time.sleep(0.2)
content = litellm.video_content(**of)
listed = litellm.video_list(custom_llm_provider="openai", **at)["data"]
print(json.dumps([status, content[4:8].decode(), len(listed), litellm.video_status(**of).seconds]))
"""


def run(*command: str | Path) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_litellm(sources: list[ModelSource], tmp_path: Path) -> None:
    with served(sources[0], tmp_path) as (_, client):
        said = run(BIN / "python", "-c", LITELLM, f"{client.base_url}/v1", PROMPT)
    assert json.loads(said.splitlines()[-1]) == ["completed", "ftyp", 1, "0.68"]


def test_aiperf(sources: list[ModelSource], tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "aiperf"
    prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in (PROMPT, "a red circle left")))
    tokenizer = Path(sources[0].checkpoint) / "tokenizer"
    with served(sources[0], tmp_path / "data") as (_, client):
        run(
            BIN / "aiperf", "profile", "--url", str(client.base_url), "--model", "tiny",
            "--api-key", "secret",
            "--endpoint-type", "video_generation", "--tokenizer", tokenizer, "--input-file", prompts,
            "--custom-dataset-type", "single_turn", "--request-count", "2", "--concurrency", "2",
            "--download-video-content", "--extra-inputs", "num_inference_steps:2", "--ui", "none",
            "--output-artifact-dir", output,
        )  # fmt: skip
        jobs: list[dict[str, Any]] = client.get("/v1/videos").json()["data"]
    assert [job["status"] for job in jobs] == ["completed"] * 2
    result = json.loads((output / "profile_export_aiperf.json").read_text())
    assert result["request_count"]["avg"] == 2 and not result.get("error_summary")
