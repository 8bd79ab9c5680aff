"""The ceiling of matrix products: the best of several, and no share of one that was measured too low."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stg_trt.benchmarks import matmuls, roofline
from stg_trt.benchmarks.matmuls import LIBRARIES, Multiply, Shape
from stg_trt.benchmarks.roofline import (
    ABOVE_CEILING,
    PeakMatmul,
    format_share,
    measure_peak_matmul,
    share_of_ceiling,
)
from stg_trt.runtime.device import Cpu, Device

SHAPES = ((64, 32, 16), (128, 128, 128))
PEAK = PeakMatmul("float32", "torch", SHAPES[0], threads=2, flops_per_s=1e9)


@pytest.fixture
def measured_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small shapes; what other tests measured, or find here, is not the same."""
    monkeypatch.setitem(roofline._SHAPES, "cpu", SHAPES)
    roofline._measured.cache_clear()
    yield
    roofline._measured.cache_clear()


@pytest.mark.parametrize("name", LIBRARIES["cpu"])
def test_every_library_multiplies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of what it was given, so that its rate is that of the operations that are counted."""
    left, right = torch.randn(8, 4), torch.randn(4, 6)
    monkeypatch.setattr(matmuls, "_random", lambda size, device: {(8, 4): left, (4, 6): right}[size])
    multiply = LIBRARIES["cpu"][name]((8, 4, 6), torch.float32, Cpu())
    assert multiply is not None
    product: Any = multiply()
    dense = product.to_dense() if name == "oneDNN" else torch.as_tensor(product)
    torch.testing.assert_close(dense, left @ right)


@pytest.mark.usefixtures("measured_anew")
def test_the_best_of_several_libraries_and_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, Shape]] = []

    def library(name: str, seconds: dict[Shape, float]) -> matmuls.Prepare:
        def prepare(shape: Shape, dtype: torch.dtype, device: Device) -> Multiply:
            tried.append((name, shape))
            return lambda: seconds[shape]

        return prepare

    libraries = {
        "busy": library("busy", {SHAPES[0]: 0.03}),
        "slow": library("slow", dict.fromkeys(SHAPES, 0.01)),
        "fast": library("fast", {SHAPES[0]: 0.01, SHAPES[1]: 0.0025}),
        "none": lambda *_: None,
    }
    monkeypatch.setitem(LIBRARIES, "cpu", libraries)
    monkeypatch.setattr(roofline, "_seconds", lambda multiply, device: iter([9.0, multiply()]))
    peak = measure_peak_matmul(Cpu(), "float32")
    # A product that takes long is not tried with a larger one.
    assert tried == [("busy", SHAPES[0]), *((name, shape) for name in ("slow", "fast") for shape in SHAPES)]
    assert (peak.library, peak.shape, peak.flops_per_s) == ("fast", SHAPES[1], 2 * 128**3 / 0.0025)
    assert peak.threads == torch.get_num_threads()


@pytest.mark.usefixtures("measured_anew")
def test_a_peak_is_measured_here_once() -> None:
    peak = measure_peak_matmul(Cpu(), "float32")
    assert peak.library in LIBRARIES["cpu"] and peak.shape in SHAPES and peak.flops_per_s > 1e6
    assert measure_peak_matmul(Cpu(), "float32") is peak
    assert peak.to_json()["tflops"] == round(peak.flops_per_s / 1e12, 4)


def test_utilisation_is_a_share_of_the_peak() -> None:
    assert PEAK.ms(10**9) == 1000
    assert PEAK.mfu(10**9, ms=2000) == 0.5
    assert format_share(0.5) == "50%"


def test_a_share_above_the_ceiling_is_none() -> None:
    """Such as the 318 % of a model at 165 GFLOP/s beside a product at 52."""
    assert share_of_ceiling(1.05) == 1.05
    assert PEAK.mfu(165 * 10**9, ms=52_000) is None
    assert format_share(PEAK.mfu(165 * 10**9, ms=52_000)) == ABOVE_CEILING
    assert "calibration too low" in ABOVE_CEILING and "%" not in ABOVE_CEILING
