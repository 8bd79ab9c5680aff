"""`stg-trt bench gpu`: parts with limits, and a record of how each stands, from the start to the end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from stg_trt.benchmarks import gpu, gpu_plan
from stg_trt.benchmarks.gpu import REHEARSED, GpuRun, bench_gpu
from stg_trt.benchmarks.gpu_plan import ON_GPU, REHEARSAL, Part
from stg_trt.benchmarks.part_process import Log, PartProcess
from stg_trt.errors import GateMissed, InvalidRequest
from tests.support.cli import assert_one_line_error, run


def python(name: str, program: str, limit_s: float = 30, **facts: Any) -> Part:
    return Part(name, (sys.executable, "-c", program), limit_s, **facts)


def measuring(name: str, folder: Path, ending: str = "pass", limit_s: float = 30) -> Part:
    """A part that writes a result, says so, and ends as it is told."""
    output = folder / f"unfinished-{name}.json"
    written = f"import pathlib, time; pathlib.Path({str(output)!r}).write_text('{{\"measured\": 1}}')"
    return python(name, f"{written}; print('written', flush=True); {ending}", limit_s, output=output)


def read(folder: Path, name: str = "gpu") -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return result


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in read(folder)["parts"]}


def run_parts(folder: Path, *stages: tuple[Part, ...], minutes: float = 1) -> None:
    GpuRun(folder, "gpu", minutes, ON_GPU).run(stages)


def test_every_part_is_recorded(tmp_path: Path) -> None:
    run_parts(tmp_path, (python("one", "print('measured')"),), (python("two", "pass"),))
    assert {name: row["ended"] for name, row in rows(tmp_path).items()} == {"one": "done", "two": "done"}
    assert rows(tmp_path)["one"]["last_lines"] == ["measured"]
    result = read(tmp_path)
    assert result["complete"] and result["rehearsal"] is None and result["device"] == "cuda"
    assert "one | measured\n" in (tmp_path / "gpu.log").read_text()


def test_what_a_part_measured_is_in_the_result(tmp_path: Path) -> None:
    run_parts(tmp_path, (measuring("step", tmp_path),))
    assert rows(tmp_path)["step"]["result"] == {"measured": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.log"]


def test_what_was_measured_before_a_cut_is_kept(tmp_path: Path) -> None:
    with pytest.raises(GateMissed, match="step cut off after 5 s"):
        run_parts(tmp_path, (measuring("step", tmp_path, "time.sleep(60)", limit_s=5),))
    assert rows(tmp_path)["step"]["result"] == {"measured": 1}


def test_an_earlier_runs_result_is_not_taken(tmp_path: Path) -> None:
    """Its process was killed; this part fails before it measures anything."""
    part = measuring("step", tmp_path)
    assert part.output is not None
    part.output.write_text('{"measured": 0}')
    failing = python("step", "raise SystemExit(1)", output=part.output)
    with pytest.raises(GateMissed):
        run_parts(tmp_path, (failing,))
    assert "result" not in rows(tmp_path)["step"]


def test_a_failure_and_a_cut_do_not_stop_the_others(tmp_path: Path) -> None:
    sleeps = "import time; print('begun', flush=True); time.sleep(60)"
    parts = [python("bad", "raise SystemExit(3)"), python("slow", sleeps, 5), python("good", "print('kept')")]
    with pytest.raises(
        GateMissed, match=r"bad failed with exit status 3; slow cut off after 5 s: the JSON has"
    ):
        run_parts(tmp_path, *((part,) for part in parts))
    ended = {name: row["ended"] for name, row in rows(tmp_path).items()}
    assert ended == {"bad": "failed with exit status 3", "slow": "cut off after 5 s", "good": "done"}
    assert rows(tmp_path)["slow"]["last_lines"][0] == "begun"


def test_parts_of_a_stage_run_beside_each_other(tmp_path: Path) -> None:
    """Each waits for a file that the other writes; and the next stage waits for both."""

    def meets(name: str, other: str) -> Part:
        program = (
            "import pathlib, sys, time\n"
            f"folder = pathlib.Path({str(tmp_path)!r})\n"
            f"(folder / {name!r}).touch()\n"
            f"while not (folder / {other!r}).exists(): time.sleep(0.05)\n"
            "time.sleep(0.5)\n"
            f"(folder / '{name}-done').touch()\n"
        )
        return python(name, program)

    check = f"import pathlib; assert len([*pathlib.Path({str(tmp_path)!r}).glob('*-done')]) == 2"
    run_parts(tmp_path, (meets("a", "b"), meets("b", "a")), (python("after", check),))
    assert all(row["ended"] == "done" for row in rows(tmp_path).values())


def test_no_part_begins_when_the_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_SMALLEST_S", 1)
    long, late = python("long", "import time; time.sleep(60)"), python("late", "pass")
    with pytest.raises(GateMissed, match="late not started: no time left"):
        run_parts(tmp_path, (long,), (late,), minutes=3 / 60)
    ends = [row["ended"].split(" after")[0] for row in rows(tmp_path).values()]
    assert ends == ["cut off", "not started: no time left"]


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_keeps_what_was_measured_and_ends_the_parts(tmp_path: Path) -> None:
    ending = f"import os, signal; os.kill({os.getpid()}, signal.SIGINT); time.sleep(60)"
    stages = (measuring("step", tmp_path, ending),), (python("later", "pass"),)
    with pytest.raises(KeyboardInterrupt):
        run_parts(tmp_path, *stages)
    assert {name: row["ended"] for name, row in rows(tmp_path).items()} == {
        "step": "interrupted",
        "later": "not started",
    }
    assert rows(tmp_path)["step"]["result"] == {"measured": 1} and not read(tmp_path)["complete"]


def test_a_killed_run_says_what_was_at_work(tmp_path: Path) -> None:
    """The JSON is written before a part begins."""
    check = (
        f"import json, pathlib; parts = json.loads(pathlib.Path({str(tmp_path / 'gpu.json')!r}).read_text())"
        "['parts']; print([part['ended'] for part in parts])"
    )
    run_parts(tmp_path, (python("now", check),), (python("later", "pass"),))
    assert rows(tmp_path)["now"]["last_lines"] == ["['running', 'not started']"]


@pytest.mark.parametrize(
    ("summary", "ended", "counts"),
    [
        ("586 passed in 20.10s", "done", {"passed": 586}),
        ("2 failed, 5 passed, 1 skipped in 3.2s", "done", {"failed": 2, "passed": 5, "skipped": 1}),
        ("7 skipped, 3 deselected in 3.2s", "failed: no test passed", {"skipped": 7}),
        ("1 error in 3.2s", "failed: no test passed", {"error": 1}),
        ("", "failed: no test passed", {}),
    ],
)
def test_tests_are_counted(tmp_path: Path, summary: str, ended: str, counts: dict[str, int]) -> None:
    """A part whose tests were all skipped has shown nothing."""
    part = python("kernel tests", f"print('12 passed tests of mine'); print({summary!r})", tests=True)
    log = Log(tmp_path / "gpu.log")
    process = PartProcess(part, os.environ, log)
    assert process.finish(30) == ended
    assert process.count_tests() == counts
    log.close()


def test_a_part_takes_its_children_with_it(tmp_path: Path) -> None:
    """A compiler's workers must not run on beside the next part."""
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    program = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    log = Log(tmp_path / "gpu.log")
    process = PartProcess(python("parent", program), os.environ, log)
    assert process.finish(6) == "cut off after 6 s"
    deadline = time.monotonic() + 5
    while alive(int(process.lines[0])):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    log.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return state != "Z"


def test_parts_import_the_package_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in the checkout, whose own `stg_trt` has no programs in it."""
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    program = "import os, sys; print(sys.path[:2], sys.flags.safe_path)"
    run_parts(tmp_path, (python("paths", program),))
    expected = f"{[str(gpu_plan.IN_PLACE), '/elsewhere']} True"
    assert rows(tmp_path)["paths"]["last_lines"] == [expected]


@pytest.mark.parametrize("scale", [ON_GPU, REHEARSAL], ids=["gpu", "rehearsal"])
def test_kernels_that_are_there_are_the_ones_that_are_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: Any
) -> None:
    monkeypatch.setattr(gpu, "KERNEL_LIBRARY", tmp_path / "libstg_kernels.so")
    assert "STG_TRT_TEST_KERNELS" not in gpu._environment(scale)
    (tmp_path / "libstg_kernels.so").touch()
    given = gpu._environment(scale).get("STG_TRT_TEST_KERNELS")
    assert given == (str(tmp_path / "libstg_kernels.so") if scale is ON_GPU else None)


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that is linked in place, and a plan of one part with a result; the folder of results."""
    (tmp_path / "in_place" / "stg_trt").mkdir(parents=True)
    monkeypatch.setattr(gpu, "IN_PLACE", tmp_path / "in_place")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(signal, "signal", lambda *_: before)
    output = tmp_path / "results"
    output.mkdir()
    monkeypatch.setattr(gpu, "plan_stages", lambda *_: [(python("kernels", "print('here')"),)])
    return output


@pytest.mark.parametrize(
    ("scale", "only", "name"),
    [(ON_GPU, None, "gpu"), (ON_GPU, "kernels", "gpu-kernels"), (REHEARSAL, None, "rehearsal")],
    ids=["all", "some", "rehearsal"],
)
def test_a_run_ends_with_a_report(
    planned: Path, capsys: pytest.CaptureFixture[str], scale: Any, only: str | None, name: str
) -> None:
    """Its files have names of their own, so that some parts do not replace the results of all."""
    bench_gpu(planned, 1, scale, None, only)
    names = sorted(path.name for path in planned.iterdir())
    assert names == [f"{name}.json", f"{name}.log", f"{name}.md"]
    assert "| kernels | done |" in (planned / f"{name}.md").read_text()
    is_rehearsal = scale is REHEARSAL
    assert (read(planned, name)["rehearsal"] == REHEARSED) == is_rehearsal
    assert (REHEARSED in (planned / f"{name}.md").read_text()) == is_rehearsal
    assert capsys.readouterr().out.startswith(REHEARSED) == is_rehearsal


def test_without_the_tree_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "IN_PLACE", tmp_path)
    with pytest.raises(InvalidRequest, match=r"gpu: expected the package in .*, got none: run make"):
        bench_gpu(tmp_path, 1, REHEARSAL, None, None)


def test_time_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="minutes: expected more than 0, got 0"):
        GpuRun(tmp_path, "gpu", 0, ON_GPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and this would use it")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--backend=tensorrt", "device: expected an NVIDIA GPU, got none"),
        ("--device=tpu", "device: expected one of cuda, cpu, got 'tpu': use cuda"),
    ],
)
def test_refused_at_the_start(tmp_path: Path, option: str, message: str) -> None:
    result = run("bench", "gpu", f"--output={tmp_path / 'results'}", option)
    assert_one_line_error(result, message)
    assert not (tmp_path / "results").exists()
