"""`stg-trt bench kernels`: every entry is verified in float64, then timed beside a copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stg_trt.benchmarks.kernel_cases import KERNELS
from stg_trt.benchmarks.kernels import KernelBenchmark
from stg_trt.errors import GateMissed
from stg_trt.runtime import operations
from stg_trt.runtime.guided_step import guided_step
from tests.support.cli import assert_one_line_error, invoke


def test_measures_every_kernel_on_every_size(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    answer = invoke(
        "bench", "kernels", "--device=cpu", "--elements=1001,4096", "--rounds=3", f"--output={output}"
    )
    assert answer.returncode == 0, answer.stderr
    result = json.loads(output.read_text())
    assert result["complete"]
    assert [(row["name"], row["elements"]) for row in result["kernels"]] == [
        (kernel.name, elements) for elements in (1001, 4096) for kernel in KERNELS
    ]
    for row in result["kernels"]:
        assert row["implementation"] == "torch reference"
        assert row["relative_error"] <= 1e-5 and row["gb_per_s"] > 0


def test_counts_the_bytes_of_every_pass_over_the_rows(tmp_path: Path) -> None:
    KernelBenchmark("cpu", (1000,), 1).run(tmp_path / "kernels.json")
    rows = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    assert {row["name"]: row["bytes"] for row in rows} == {
        "fan_out_rows": (1 + 3) * 4 * 1000,
        # q and k are read and written; the two tables hold each pair of channels once.
        "qk_norm_rope": (4 + 2 / 2) * 4 * 2048,
        "guided_step": (2 * 3 + 2) * 4 * 1000,
        "guided_step, no rescale": (3 + 2) * 4 * 1000,
        "guided_step, CFG-Zero*": (2 * 3 + 2 + 2) * 4 * 1000,
    }


def test_a_wrong_kernel_is_timed_but_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(state: Any, *arguments: Any, **options: Any) -> None:
        guided_step(state, *arguments, **options)
        state.latents.mul_(1.001)

    monkeypatch.setattr(operations, "guided_step", off)
    with pytest.raises(
        GateMissed, match=r"guided_step: expected torch reference of 1000 elements .* got 1.0e-03"
    ):
        KernelBenchmark("cpu", (1000,), 1).run(tmp_path / "kernels.json")
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert result["complete"] and not result["trusted"] and len(result["kernels"]) == len(KERNELS)
    off_kernels = [kernel.name for kernel in KERNELS if kernel.name.startswith("guided_step")]
    assert [doubt.split(":")[0] for doubt in result["doubts"]] == off_kernels


def test_elements_are_numbers(tmp_path: Path) -> None:
    result = invoke("bench", "kernels", "--elements=1e6", f"--output={tmp_path / 'kernels.json'}")
    assert_one_line_error(result, "elements: expected numbers above 1 separated by commas, got '1e6'")
