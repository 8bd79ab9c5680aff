"""`stg-trt serve` as operators run it: killed, started again, told to end; and what it does not take."""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stg_trt.runtime.server import command
from stg_trt.runtime.server.model_sources import folders_of, names_of
from stg_trt.runtime.server.served_model import ModelSource
from tests.support.cli import ROOT, assert_one_line_error, invoke
from tests.support.running_server import PROMPT, served, wait_for

# More than a second, to be killed in between.
STEPS = 120


def test_jobs_survive_a_kill_and_a_server_ends_when_told(sources: list[ModelSource], tmp_path: Path) -> None:
    source, data, output = sources[0], tmp_path / "data", tmp_path / "video.mp4"
    given = {"prompt": PROMPT, "num_inference_steps": STEPS}
    with served(source, data) as (process, client):
        made = [client.post("/v1/videos", json={**given, "seed": seed}).json()["id"] for seed in (1, 2)]
        wait_for(lambda: client.get(f"/v1/videos/{made[0]}").json()["progress"] > 10)
        at_most = client.get(f"/v1/videos/{made[0]}").json()["progress"]
        process.kill()
        assert process.wait(60) == -signal.SIGKILL and at_most < 99
    with served(source, data) as (process, client):
        for id in made:
            wait_for(lambda id=id: client.get(f"/v1/videos/{id}").json()["status"] == "completed")  # type: ignore[misc]
        got = [client.get(f"/v1/videos/{id}/content").content for id in made]
        last = client.post("/v1/videos", json={**given, "seed": 3}).json()["id"]
        wait_for(lambda: client.get(f"/v1/videos/{last}").json()["status"] == "in_progress")
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/health/ready").json()["status"] == "draining")
        assert client.post("/v1/videos", json=given).status_code == 503
        assert process.wait(120) == 0
    assert (data / "videos" / f"{last}.mp4").exists()
    options = ("--prompt", PROMPT, "--seed=1", f"--num-inference-steps={STEPS}", "--output", output)
    assert invoke("generate", source.checkpoint, "--engines", source.engines[0], *options).returncode == 0
    assert got[0] == output.read_bytes() and got[1] != got[0]


def test_what_cannot_be_served(sources: list[ModelSource], tmp_path: Path, ltx_checkpoint: Path) -> None:
    wide, small = sources
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        folders = ("--engines", wide.engines[0], "--engines", small.engines[0])
        cases: list[tuple[tuple[Any, ...], str]] = [
            ((wide.checkpoint,), "Missing option '--engines': see stg-trt serve --help"),
            ((wide.checkpoint, *folders, f"--port={port}"), f"port: expected .* port {port} .*choose"),
            ((wide.checkpoint, *folders, "--host=no.such.host.invalid"), "port: expected an address"),
            ((wide.checkpoint, *folders, "--port=99999"), "Invalid value for '--port': .*--help"),
            ((wide.checkpoint, "--engines", tmp_path / "none"), "engines: expected a folder made by"),
            ((wide.checkpoint, "--engines", small.engines[0]), "built from other weights"),
            ((ltx_checkpoint, *folders), "checkpoint: expected a text encoder"),
            ((wide.checkpoint,) * 3 + folders, "engines: expected one folder, or one for each of 3 checkp"),
            ((wide.checkpoint, wide.checkpoint, *folders), "model_name: expected different .* twice"),
            ((wide.checkpoint, *folders, "--model-name=a", "--model-name=b"), "expected one for each of 1"),
            ((wide.checkpoint, *folders, "--max-queue=0"), "max_queue: expected a number above 0, got 0"),
            ((wide.checkpoint, *folders, "--drain-seconds=-1"), "drain_seconds: expected a number of 0"),
            ((wide.checkpoint, *folders, "--quota-gib=nan"), "quota_gib: expected a number above 0, got nan"),
            ((wide.checkpoint, *folders, "--expire-hours=inf"), "expire_hours: expected a number above 0"),
            ((wide.checkpoint, *folders, "--max-upload-mib=-1"), "max_upload_mib: expected .* got -1: corr"),
            ((wide.checkpoint, *folders, "--api-key="), "api_key: expected a key, got an empty text"),
            ((wide.checkpoint, *folders, "--data", tmp_path / "file"), "data: expected a folder that can be"),
        ]  # fmt: skip
        for arguments, pattern in cases:
            data = () if "--data" in arguments else ("--data", tmp_path / "data")
            port_of_its_own = () if any("--port" in str(one) for one in arguments) else ("--port=0",)
            assert_one_line_error(invoke("serve", *arguments, *data, *port_of_its_own), pattern)


def test_which_engines_and_names_a_checkpoint_gets() -> None:
    a, b = Path("a"), Path("b")
    assert folders_of(["x"], [a, b]) == [(a, b)]
    assert folders_of(["x", "y"], [a]) == [(a,), (a,)]
    assert folders_of(["x", "y"], [a, b]) == [(a,), (b,)]
    assert names_of(["owner/name-1.3B", "tests/server"], []) == ["name-1.3B", "server"]
    assert names_of(["x", "x"], ["one", "two"]) == ["one", "two"]


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    result = invoke("serve", "x", "--engines", "y", "--data", tmp_path / "data")
    assert_one_line_error(result, r"serve: expected the Python module uvicorn, got none: .*'\.\[serve\]'")
    assert not (tmp_path / "data").exists()


def test_the_command_line_is_light() -> None:
    program = (
        "import sys, typer.main; from stg_trt.cli.main import _application;"
        "typer.main.get_command(_application());"
        "print({'fastapi', 'uvicorn', 'starlette', 'torch', 'sqlite3'} & {*sys.modules})"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "set()"
