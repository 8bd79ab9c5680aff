"""`stg-trt bench gpu`: parts with limits, and a record of how each ended."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from stg_trt.benchmarks import gpu
from stg_trt.benchmarks.gpu import GpuRun, Part, planned_parts, run_part
from stg_trt.errors import GateMissed, InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from tests.support.cli import assert_one_line_error, invoke

WORKLOADS = ("step", "peers", "sample")


def python(name: str, program: str, limit_s: float = 30) -> Part:
    return Part(name, (sys.executable, "-c", program), limit_s)


def rows(folder: Path) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = json.loads((folder / "gpu.json").read_text())["parts"]
    return parts


def test_every_part_is_recorded(tmp_path: Path) -> None:
    GpuRun(tmp_path, 1).run([python("one", "print('measured')"), python("two", "pass")])
    assert [(row["name"], row["ended"]) for row in rows(tmp_path)] == [("one", "done"), ("two", "done")]
    assert rows(tmp_path)[0]["last_lines"] == ["measured"]
    assert json.loads((tmp_path / "gpu.json").read_text())["complete"]


@pytest.mark.slow(reason="waits for parts to be cut off")
def test_a_failure_and_a_cut_do_not_stop_the_others(tmp_path: Path) -> None:
    sleeps = "import time; print('begun', flush=True); time.sleep(60)"
    parts = [python("bad", "raise SystemExit(3)"), python("slow", sleeps, 5), python("good", "print('kept')")]
    with pytest.raises(
        GateMissed, match=r"bad failed with exit status 3; slow cut off after 5 s: gpu\.json has"
    ):
        GpuRun(tmp_path, 1).run(parts)
    ended = {row["name"]: row["ended"] for row in rows(tmp_path)}
    assert ended == {"bad": "failed with exit status 3", "slow": "cut off after 5 s", "good": "done"}
    assert rows(tmp_path)[1]["last_lines"][0] == "begun"


@pytest.mark.slow(reason="waits for parts to be cut off")
def test_no_part_begins_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_SMALLEST_S", 1)
    parts = [python("long", "import time; time.sleep(60)"), python("late", "pass")]
    with pytest.raises(GateMissed, match="late not started: no time left"):
        GpuRun(tmp_path, 3 / 60).run(parts)
    ends = [row["ended"].split(" after")[0] for row in rows(tmp_path)]
    assert ends == ["cut off", "not started: no time left"]


@pytest.mark.slow(reason="waits for parts to be cut off")
def test_a_part_takes_its_children_with_it(tmp_path: Path) -> None:
    """A compiler's workers must not run on beside the next part."""
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    program = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    ended, lines = run_part(python("parent", program, 30), 6)
    assert ended == "cut off after 6 s"
    deadline = time.monotonic() + 5
    while alive(int(lines[0])):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return state != "Z"


def test_the_most_valuable_part_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_LIBRARY", Path(__file__))
    parts = planned_parts(tmp_path, tmp_path / "engines", "inductor")
    assert [part.name for part in parts[:4]] == [
        "gpu tests",
        "step ltx-video-2b-704x480x121",
        "peers ltx-video-2b-704x480x121",
        "kernels",
    ]
    assert [part.name for part in parts[4:]] == [
        "foreign engine",
        "sample ltx-video-2b-704x480x121",
        *(
            f"{workload} {model}"
            for model in (
                "ltx-video-2b-1216x704x121",
                "cogvideox-2b-720x480x49",
                "wan2.1-t2v-1.3b-832x480x81",
            )
            for workload in ("step", "peers")
        ),
    ]


def test_models_are_perturbed_as_their_families_are() -> None:
    for model in (gpu.LTX, gpu.LARGE_LTX, gpu.COGVIDEOX, gpu.WAN):
        defaults = Checkpoint.open(model.name, random_weights=True).family.defaults
        assert (model.stg_mode, (model.stg_block,)) == (defaults.stg_mode, defaults.stg_blocks)


def test_some_parts_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [python(name, "pass") for name in ("gpu tests", "kernel build", "step a-1x1", "peers a-1x1")]
    parts += [python("step b-1x1", "pass")]
    assert gpu.chosen_parts(parts, None) == parts
    names = [part.name for part in gpu.chosen_parts(parts, "b-1, peers")]
    assert names == ["kernel build", "peers a-1x1", "step b-1x1"]
    for wrong in ("sample", "step,", ""):
        with pytest.raises(InvalidRequest, match=r"only: expected words of the parts gpu tests, .* got '"):
            gpu.chosen_parts(parts, wrong)


def test_the_planned_commands_parse(tmp_path: Path) -> None:
    """Every option of every part is known to the command; a backend that is not there ends it."""
    parts = planned_parts(tmp_path, tmp_path / "engines", "no-such-backend")
    # The last of each kind have the most options.
    of_each_kind = {part.name.split()[0]: part for part in parts if part.name.startswith(WORKLOADS)}
    assert of_each_kind.keys() == set(WORKLOADS)
    for part in of_each_kind.values():
        answer = invoke("bench", *part.command[3:])
        assert_one_line_error(answer, "backend: expected one of .*, got 'no-such-backend'")


def test_time_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="minutes: expected more than 0, got 0"):
        GpuRun(tmp_path, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and this would use it")
def test_no_gpu(tmp_path: Path) -> None:
    result = invoke("bench", "gpu", f"--output={tmp_path / 'results'}", "--backend=tensorrt")
    assert_one_line_error(result, "device: expected an NVIDIA GPU, got none")
    assert not (tmp_path / "results").exists()
