"""`stg-trt bench report`: tables, goals and a plot from results alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from stg_trt.benchmarks.report import write_report
from stg_trt.errors import BackendUnavailable, InvalidRequest
from tests.support.cli import assert_one_line_error, invoke

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
GPU = {"name": "NVIDIA Example", "driver": "580.1", "cuda": "13.0", "sm": "sm_90"}
MACHINE = {
    "date": "2026-01-02",
    "commit": "0123456789ab",
    "processor": "A CPU",
    "cores": 2,
    "gpu": GPU,
    "versions": {"torch": "2.13.0"},
    "complete": True,
}
LTX: dict[str, Any] = {
    "model": "ltx-video-2b",
    "backend": "inductor",
    "workload": {"height": 480, "width": 704, "num_frames": 121, "text_length": 128, "precision": "bf16"},
    "peak_matmul": {
        "dtype": "bfloat16",
        "library": "cuBLASLt",
        "shape": [8192, 8192, 8192],
        "tflops": 700.0,
    },
}


def row(median_ms: float, **more: Any) -> dict[str, Any]:
    return {
        "median_ms": median_ms,
        "p10_ms": median_ms * 0.9,
        "p90_ms": median_ms * 1.2,
        "gflop": 50000.0,
        "roofline_ms": 60.0,
        "mfu": 60 / median_ms,
        **more,
    }


STEP = {
    **MACHINE,
    **LTX,
    "benchmark": "step",
    "model_bytes": 1000,
    "layouts": {"segmented": {"weight_bytes": 1010}},
    "timings": {"shared": row(100, peak_bytes=2e9, kernels=900, launches=1, host_syncs=0), "cfg": row(85)},
    "stg_over_cfg": 1.176,
    "stg_over_cfg_flops": 1.142,
}
PEERS = {
    **MACHINE,
    **LTX,
    "benchmark": "peers",
    "left_out": {"compiled": "not named by --peers"},
    "timings": {"stg_trt": row(100), "eager": row(160)},
    "eager_over_stg_trt": 1.6,
}


def save(folder: Path, **results: Any) -> list[Path]:
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
    return [folder / f"{name}.json" for name in results]


def test_tables_goals_and_plot(tmp_path: Path) -> None:
    paths = save(tmp_path, step=STEP, peers=PEERS)
    answer = invoke("bench", "report", *paths, "--output", tmp_path / "out" / "report.md")
    assert answer.returncode == 0, answer.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## step, ltx-video-2b, 704x480x121 bf16, inductor\n" in text
    assert "NVIDIA Example, driver 580.1, CUDA 13.0; commit 0123456789ab, 2026-01-02; torch 2.13.0." in text
    assert "| shared | 100.00 | 90.00 | 120.00 | 50,000.0 | 60% | 2,000 | 900 | 1 | 0 |" in text
    assert "stg / cfg: 1.176 (1.142 by operations)" in text
    assert "| STG step / CFG step | NVIDIA Example | <= 1.18 | 1.176 | met |" in text
    assert (
        "| diffusers eager / stg_trt | NVIDIA Example | >= 1.7 | 1.600 | missed: reason not known yet |"
        in text
    )
    assert "| torch.compile / stg_trt | NVIDIA Example | >= 1.25 | not measured |  |" in text
    assert "| engine bytes / model bytes | NVIDIA Example | <= 1.05 | 1.010 | met |" in text
    assert "Left out: compiled (not named by --peers)." in text
    assert "MFU is of 700.00 TFLOP/s, the fastest bfloat16 product: 8192x8192x8192 by cuBLASLt." in text
    assert "(report.png)" in text
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_missed_goal_is_published_with_its_reason(tmp_path: Path) -> None:
    reasons = tmp_path / "reasons.json"
    reasons.write_text(json.dumps({"diffusers eager / stg_trt": "attention is the same kernel"}))
    write_report(save(tmp_path, peers=PEERS), tmp_path / "report.md", reasons)
    assert "| 1.600 | missed: attention is the same kernel |" in (tmp_path / "report.md").read_text()


def test_goals_are_for_the_model_and_size_they_name(tmp_path: Path) -> None:
    small = {**STEP, "workload": {**LTX["workload"], "height": 704, "width": 1216}}
    on_a_cpu, shortened = {**STEP, "gpu": None}, {**STEP, "blocks": [3]}
    results = save(tmp_path, small=small, cpu=on_a_cpu, shortened=shortened)
    write_report(results, tmp_path / "report.md", None)
    assert "| goal |" not in (tmp_path / "report.md").read_text()


def test_a_result_that_is_not_trusted_is_not_published(tmp_path: Path) -> None:
    untrusted = {**PEERS, "trusted": False, "doubts": ["stg_trt: expected cond within 1e-2, got inf"]}
    write_report(save(tmp_path, step=STEP, peers=untrusted), tmp_path / "report.md", None)
    text = (tmp_path / "report.md").read_text()
    assert "Not published, since it is not trusted: stg_trt: expected cond within 1e-2, got inf." in text
    assert "| diffusers eager / stg_trt | NVIDIA Example | >= 1.7 | not trusted |  |" in text
    assert "| eager |" not in text and "1.600" not in text
    assert "| STG step / CFG step | NVIDIA Example | <= 1.18 | 1.176 | met |" in text


def test_a_share_above_the_ceiling_is_no_share(tmp_path: Path) -> None:
    above = {**STEP, "timings": {"shared": {**row(100), "mfu": None}}}
    write_report(save(tmp_path, step=above), tmp_path / "report.md", None)
    text = (tmp_path / "report.md").read_text()
    assert "| 50,000.0 | above the measured ceiling: calibration too low |" in text


def test_optimisations_have_what_was_expected_of_them(tmp_path: Path) -> None:
    facts = {"backend": "inductor", "part": "block", "derivation": "bytes"}
    listed = [
        {"name": "half RoPE tables", **facts, "expected": 1.1428, "measured": 1.1},
        {"name": "static profiles", **facts, "expected": None, "measured": None},
    ]
    write_report(save(tmp_path, step={**STEP, "optimisations": listed}), tmp_path / "report.md", None)
    text = (tmp_path / "report.md").read_text()
    assert "| half RoPE tables | inductor | block | bytes | 1.143x | 1.100x |" in text
    assert "| static profiles | inductor | block | bytes | no formula | not measured |" in text


def test_a_run_on_a_gpu_brings_the_results_of_its_parts(tmp_path: Path) -> None:
    parts = [
        {"name": "kernel tests", "ended": "done", "seconds": 21.0, "tests": {"passed": 586}},
        {
            "name": "step",
            "ended": "cut off after 150 s",
            "seconds": 150.0,
            "result": {**STEP, "complete": False},
        },
    ]
    run_on_gpu = {**MACHINE, "benchmark": "gpu", "rehearsal": None, "parts": parts}
    write_report(save(tmp_path, gpu=run_on_gpu), tmp_path / "report.md", None)
    text = (tmp_path / "report.md").read_text()
    assert "| kernel tests | done | 586 passed | 21 |" in text
    assert "## step, ltx-video-2b, 704x480x121 bf16, inductor (cut off)\n" in text
    assert "| STG step / CFG step | NVIDIA Example | <= 1.18 | 1.176 | met |" in text


def test_a_rehearsal_says_that_it_is_one(tmp_path: Path) -> None:
    rehearsal = {
        **MACHINE,
        "gpu": None,
        "benchmark": "gpu",
        "rehearsal": "A rehearsal on a CPU.",
        "parts": [],
    }
    write_report(save(tmp_path, rehearsal=rehearsal), tmp_path / "report.md", None)
    text = (tmp_path / "report.md").read_text()
    assert "## rehearsal\n" in text and "A rehearsal on a CPU.\n" in text


def test_a_result_that_was_cut_off_says_so(tmp_path: Path) -> None:
    cut = {name: value for name, value in STEP.items() if name not in ("timings", "stg_over_cfg")}
    write_report(save(tmp_path, step={**cut, "complete": False}), tmp_path / "report.md", None)
    assert "inductor (cut off)" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "report.png").exists()


@pytest.mark.parametrize("content", ["{}", "[1]", "not JSON", '{"benchmark": "speed"}'])
def test_what_is_no_result(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InvalidRequest, match=r"report: expected a (JSON )?result"):
        write_report([tmp_path / "x.json"], tmp_path / "report.md", None)
    assert not (tmp_path / "report.md").exists()


def test_a_name_that_is_no_markdown(tmp_path: Path) -> None:
    result = invoke("bench", "report", *save(tmp_path, step=STEP), "--output", tmp_path / "report.txt")
    assert_one_line_error(result, "output: expected a name ending in .md")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailable, match=r"expected matplotlib .* pip install 'stg-trt.benchmarks.'"):
        write_report(save(tmp_path, step=STEP), tmp_path / "report.md", None)
    assert not (tmp_path / "report.md").exists()


def test_the_published_table_of_builds_is_that_of_its_results(tmp_path: Path) -> None:
    write_report(sorted(RESULTS.glob("build-*.json")), tmp_path / "builds.md", None)
    assert (tmp_path / "builds.md").read_text() == (RESULTS / "builds.md").read_text()
