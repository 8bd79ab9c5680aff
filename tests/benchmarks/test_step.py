"""`stg-trt bench step`: what it records, and what it refuses to time."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stg_trt.benchmarks import step
from stg_trt.benchmarks.loaded_build import LoadedBuild
from stg_trt.benchmarks.report import write_report
from stg_trt.benchmarks.scenario import Scenario
from stg_trt.benchmarks.step import NO_GRAPH, StepBenchmark
from stg_trt.errors import GateMissed
from stg_trt.runtime.device import Cpu
from tests.support.broken_plan import unperturbed
from tests.support.cli import assert_one_line_error, invoke, run, start

PLANS = {"shared": "segmented", "full": "segmented", "cfg": "segmented", "twin": "twin", "twin cfg": "twin"}


def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def test_measures_every_plan(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    output = tmp_path / "new folder" / "step.json"
    answer = invoke("bench", "step", *tiny, "--rounds=3", "--output", output)
    assert answer.returncode == 0, answer.stderr
    result = read(output)
    assert result["complete"] and result["benchmark"] == "step" and result["rounds"] == 3
    assert {name: row["layout"] for name, row in result["timings"].items()} == PLANS
    for row in result["timings"].values():
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["roofline_ms"] > 0 and (row["mfu"] is None or 0 < row["mfu"] <= 1.05)
        assert row["peak_bytes"] >= 0 and row["gflop"] > 0 and row["host_median_ms"] > 0
    assert result["shared_over_full_flops"] < 1 < result["stg_over_cfg_flops"]
    expected = result["shared_over_full"] / result["shared_over_full_flops"] - 1
    assert result["deviation"] == pytest.approx(expected, abs=2e-4)
    assert "by FLOPs" in answer.stdout and "shared / full: " in answer.stdout
    assert result["peak_matmul"]["dtype"] == "float32" and result["peak_matmul"]["tflops"] > 0
    assert result["trusted"] and result["doubts"] == []
    assert result["gpu"] is None and {"torch", "diffusers", "onnxruntime"} <= result["versions"].keys()
    for errors in result["verification"].values():
        assert max(errors.values()) <= 1e-4
    assert result["verification"].keys() == PLANS.keys()


def test_measures_a_family_with_a_multi_step_solver(tmp_path: Path, tiny_wan: tuple[str, ...]) -> None:
    output = tmp_path / "step.json"
    answer = invoke("bench", "step", *tiny_wan, "--layouts=segmented", "--rounds=2", "--output", output)
    assert answer.returncode == 0, answer.stderr
    result = read(output)
    assert result["complete"] and result["tokens"] == 36
    assert result["verification"].keys() == {"shared", "full", "cfg"}
    assert max(max(errors.values()) for errors in result["verification"].values()) <= 1e-4


def test_measures_some_of_the_blocks(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    output, shortened = tmp_path / "step.json", ("--blocks=1", "--stg-blocks=0", "--layouts=segmented")
    answer = invoke("bench", "step", *tiny, *shortened, "--precision=fp32", "--rounds=1", "--output", output)
    assert answer.returncode == 0, answer.stderr
    assert "text, front, block_0, back" in answer.stderr
    result = read(output)
    assert result["complete"] and result["blocks"] == [1]
    (report,) = (p for p in write_report([output], tmp_path / "x.md", None) if p.suffix == ".md")
    assert "32x2, 1 of its blocks, 160x128x17 fp32" in report.read_text()


def test_the_segmented_layout_holds_its_weights_once(
    tmp_path: Path, engines: Path, scenario: Scenario
) -> None:
    StepBenchmark(scenario, ("segmented", "twin"), 1).run(tmp_path / "step.json", engines)
    result = read(tmp_path / "step.json")
    once, twice = (result["layouts"][layout]["weight_bytes"] for layout in ("segmented", "twin"))
    assert result["model_bytes"] <= once < 1.3 * result["model_bytes"] < twice


def test_a_broken_plan_is_timed_but_not_trusted(
    tmp_path: Path, engines: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time on a GPU may not come again; the report refuses it."""
    monkeypatch.setattr(step, "plan_step", unperturbed)
    with pytest.raises(
        GateMissed, match=r"shared: expected skip within .* got .*: what was measured is kept"
    ):
        StepBenchmark(scenario, ("segmented",), 1).run(tmp_path / "step.json", engines)
    result = read(tmp_path / "step.json")
    assert (
        result["complete"] and not result["trusted"] and result["timings"].keys() == {"shared", "full", "cfg"}
    )
    skip = [doubt for doubt in result["doubts"] if doubt.startswith("shared: expected skip within")]
    assert len(skip) == 2 and "of the eager diffusers model" in skip[0] and "of the full plan's" in skip[1]
    write_report([tmp_path / "step.json"], tmp_path / "report.md", None)
    text = (tmp_path / "report.md").read_text()
    assert "Not published, since it is not trusted: shared: expected skip" in text
    assert "median ms" not in text and not (tmp_path / "report.png").exists()


def test_predictions_that_are_no_numbers_are_recorded(
    tmp_path: Path, engines: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As JSON has none for them."""
    preds = LoadedBuild.preds

    def broken(self: LoadedBuild, step: Any) -> dict[str, torch.Tensor]:
        return {name: rows * float("nan") for name, rows in preds(self, step).items()}

    monkeypatch.setattr(LoadedBuild, "preds", broken)
    with pytest.raises(GateMissed, match=r"shared: expected uncond within .*, got inf"):
        StepBenchmark(scenario, ("segmented",), 1).run(tmp_path / "step.json", engines)
    result = json.loads((tmp_path / "step.json").read_text(), parse_constant=pytest.fail)
    assert result["verification"]["shared"] == {"uncond": None, "cond": None, "skip": None}
    assert result["max_abs_shared_against_full"] is None


def test_a_perturbation_without_effect_cannot_be_checked(
    tmp_path: Path, engines: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stg_trt.benchmarks.verify._FLOAT32_LIMIT", 1e3)
    with pytest.raises(GateMissed, match="the check would see no difference"):
        StepBenchmark(scenario, ("segmented",), 1).run(tmp_path / "step.json", engines)
    assert not read(tmp_path / "step.json")["trusted"]


def test_what_is_measured_is_kept(
    tmp_path: Path, engines: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Scenario.build

    def cut_off(self: Scenario, layout: str, root: Path) -> Any:
        if layout == "twin":
            raise KeyboardInterrupt
        return build(self, layout, root)

    monkeypatch.setattr(Scenario, "build", cut_off)
    with pytest.raises(KeyboardInterrupt):
        StepBenchmark(scenario, ("segmented", "twin"), 2).run(tmp_path / "step.json", engines)
    result = read(tmp_path / "step.json")
    assert not result["complete"]
    assert result["timings"].keys() == {"shared", "full", "cfg"} and result["shared_over_full"] > 0


@pytest.mark.slow(reason="starts a benchmark and interrupts it")
def test_interrupted(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    output = tmp_path / "step.json"
    process = start("bench", "step", *tiny, "--rounds=1000000", "--output", output)
    deadline = time.monotonic() + 120
    while not output.exists() or "verification" not in read(output):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert_one_line_error(
        subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr), "interrupted"
    )
    assert not read(output)["complete"]
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]


class Capturing(Cpu):
    """A CPU that says it has graphs; a graph runs its work again."""

    captures = True

    def capture(self, work: Callable[[], None]) -> Any:
        class Graph:
            nodes = 7

            def replay(self) -> None:
                work()

        return Graph()


def test_graph_on_and_off(
    tmp_path: Path, engines: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scenario, "device", lambda self: Capturing())
    StepBenchmark(scenario, ("segmented",), 1).run(tmp_path / "step.json", engines)
    timings = read(tmp_path / "step.json")["timings"]
    assert {name: row["graph_nodes"] for name, row in timings.items()} == {
        **dict.fromkeys(("shared", "full", "cfg"), 7),
        **dict.fromkeys((f"shared{NO_GRAPH}", f"full{NO_GRAPH}", f"cfg{NO_GRAPH}"), 0),
    }


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_host(tmp_path: Path, scenario: Scenario) -> None:
    on_gpu = replace(scenario, backend="inductor", target="this-gpu")
    StepBenchmark(on_gpu, ("segmented",), 3).run(tmp_path / "step.json", tmp_path / "engines")
    result = read(tmp_path / "step.json")
    assert result["complete"] and result["gpu"]["driver"] != "unknown"
    for name in ("shared", "full", "cfg"):
        captured, plain = result["timings"][name], result["timings"][f"{name}{NO_GRAPH}"]
        # torch may write the seed and offset of its random numbers before a graph.
        assert captured["graph_nodes"] + 2 >= captured["kernels"] > 0
        assert captured["launches"] <= 3 < plain["launches"]
        assert captured["host_syncs"] == plain["host_syncs"] == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--output={file}/x.json", "output: expected a folder that can be made, got .*: choose another"),
        ("--output={folder}", "output: expected a file's name, got the folder"),
        ("--stg-blocks=2", "stg_blocks: expected block numbers from 0 to 1"),
        ("--stg-blocks=", "stg_blocks: expected blocks to perturb, got none"),
        ("--height=65", "height: expected a positive multiple of 32, got 65"),
        ("--layouts=segmented,double", "layout: expected one of segmented, twin"),
        pytest.param(
            "--blocks=3",
            "blocks: expected num_layers 1 to 2, got 3: write --blocks 2",
            marks=pytest.mark.slow(reason="starts the program"),
        ),
        (
            "--precision=bf16",
            "precision: expected fp32 or fp8 for onnxruntime, got 'bf16': use --precision fp32",
        ),
        ("--backend=cudnn", "backend: expected one of"),
        ("--backend=tensorrt", "device: expected an NVIDIA GPU, got none"),
    ],
)
def test_refused_at_the_start(tmp_path: Path, tiny: tuple[str, ...], option: str, message: str) -> None:
    (tmp_path / "file").touch()
    given = option.format(file=tmp_path / "file", folder=tmp_path)
    ask = run if option == "--blocks=3" else invoke
    result = ask("bench", "step", *tiny, f"--output={tmp_path / 'step.json'}", given)
    assert_one_line_error(result, message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
