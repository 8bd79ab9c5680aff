"""Results: whole or not at all, and checked for before anything is measured."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from stg_trt.benchmarks import record
from stg_trt.benchmarks.record import Record, environment, percentiles
from stg_trt.errors import InvalidRequest
from tests.support.cli import assert_one_line_error, invoke, run, some_started

COMMANDS = ("sample", "peers", "kernels", "foreign-engine", "build")


def test_grows_and_is_whole_every_time(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.json"
    results = Record(path, "step", model="small")
    assert path.parent.is_dir() and not path.exists()
    results.add(first=1)
    assert json.loads(path.read_text())["first"] == 1
    with pytest.raises(TypeError):
        results.add(second=object())
    kept = json.loads(path.read_text())
    assert kept["first"] == 1 and kept["benchmark"] == "step" and kept["complete"] is False
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_finished(tmp_path: Path) -> None:
    Record(tmp_path / "x.json", "step").finish()
    assert json.loads((tmp_path / "x.json").read_text())["complete"] is True


def test_the_output_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="expected a file's name, got the folder"):
        Record(tmp_path, "step")


def test_environment_names_the_machine_and_the_commit() -> None:
    found = environment()
    assert {
        "date",
        "commit",
        "processor",
        "cores",
        "torch_threads",
        "gpu",
        "python",
        "versions",
    } == found.keys()
    assert found["commit"] != "unknown"


def test_a_copy_without_history_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", no_git)
    assert record._commit() == "unknown"
    monkeypatch.setenv("STG_TRT_COMMIT", "abc123")
    assert record._commit() == "abc123"


def test_percentiles_are_milliseconds() -> None:
    found = percentiles([i / 1000 for i in range(11)], "host_")
    assert found == {"host_median_ms": 5.0, "host_p10_ms": 1.0, "host_p90_ms": 9.0}


@pytest.mark.parametrize("command", some_started(COMMANDS, {"kernels"}))
def test_every_command_checks_its_output_first(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").touch()
    sizes = ("ltx-video-2b", "--height=480", "--width=704", "--num-frames=121") if command == "build" else ()
    ask = run if command == "kernels" else invoke
    result = ask("bench", command, *sizes, f"--output={tmp_path / 'file' / 'x.json'}")
    assert_one_line_error(result, "output: expected a folder that can be made, got .*: choose another")
