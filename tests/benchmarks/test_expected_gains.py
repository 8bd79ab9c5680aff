"""What optimisations should gain, by hand, and what is measured of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stg_trt.benchmarks.expected_gains import GAINS, SIZES, Gain, Rates, Sizes
from stg_trt.benchmarks.kernels import KernelBenchmark
from stg_trt.benchmarks.report import write_report

LTX = SIZES["cuda"]
H100 = Rates(flops_per_s=790e12, bytes_per_s=3e12, multiprocessors=132)


def gain(name: str) -> Gain:
    return next(gain for gain in GAINS if gain.name == name)


def expected(name: str, sizes: Sizes = LTX, rates: Rates = H100) -> float | None:
    return gain(name).expected(sizes, rates)


def test_tables_by_the_bytes_of_a_token() -> None:
    """Per channel and token 24 bytes of q and k in three rows, and 4 of each half table."""
    assert expected("half RoPE tables") == pytest.approx((24 + 8) / (24 + 4))
    assert expected("one RoPE table for all rows") == pytest.approx((24 + 3 * 4) / (24 + 4))


@pytest.mark.parametrize(
    ("rows", "before", "after"),
    # 42, 83 and 124 rows of 8 tiles each, over 132 multiprocessors.
    [(1, 3 * 3, 8), (2, 3 * 6, 16), (3, 3 * 8, 23)],
)
def test_products_by_their_rounds_of_tiles(rows: int, before: int, after: int) -> None:
    sizes = Sizes(rows, 5280, 2048, 8192, torch.bfloat16)
    assert expected("q, k and v in one product", sizes) == pytest.approx(before / after)


def test_a_cpu_has_no_tiles_to_fill() -> None:
    assert expected("q, k and v in one product", rates=Rates(1e11, 1e10, None)) == 1


def test_gelu_by_a_pass_over_its_values() -> None:
    """2*2048 operations a value, and 4 bytes."""
    assert expected("GELU in the product's epilogue") == pytest.approx(1 + (4 / 3e12) / (4096 / 790e12))


def test_the_kernels_result_and_its_report_have_them(tmp_path: Path) -> None:
    KernelBenchmark("cpu", (1000,), 2).run(tmp_path / "kernels.json")
    listed = json.loads((tmp_path / "kernels.json").read_text())["optimisations"]
    measured = {row["name"]: row["measured"] for row in listed}
    assert measured.keys() == {gain.name for gain in GAINS}
    assert {name for name, ratio in measured.items() if ratio} == {"q, k and v in one product"}
    write_report([tmp_path / "kernels.json"], tmp_path / "report.md", None)
    text = (tmp_path / "report.md").read_text()
    assert "| timing cache | tensorrt | step | same kernels;" in text and "| 1.000x | not measured |" in text


@pytest.mark.gpu
def test_every_pair_runs_on_a_gpu(tmp_path: Path) -> None:
    KernelBenchmark("cuda", (1000,), 2).run(tmp_path / "kernels.json")
    listed = json.loads((tmp_path / "kernels.json").read_text())["optimisations"]
    measured = [row["name"] for row in listed if row["measured"] is not None]
    assert measured == [gain.name for gain in GAINS if gain.works is not None]
