"""TensorRT's builder and the GPU of this machine, as a build finds them."""

from __future__ import annotations

import pytest

from stg_trt.build_engines import build, compile_tensorrt
from stg_trt.system.gpu import Gpu
from tests.support.simulated_builder import SimulatedTensorRTBuilder

H100 = Gpu("NVIDIA H100 80GB HBM3", "sm_90", 80 << 30, 132, "580.65.06")


def simulated_build(monkeypatch: pytest.MonkeyPatch) -> SimulatedTensorRTBuilder:
    """The library that builds load from now on, on an H100."""
    simulated = SimulatedTensorRTBuilder()
    monkeypatch.setattr(compile_tensorrt, "load_library", lambda backend: simulated)
    monkeypatch.setattr(compile_tensorrt, "library_version", lambda backend: simulated.__version__)
    place_gpu(monkeypatch, H100)
    return simulated


def place_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None) -> None:
    """Builds find this one from now on."""
    monkeypatch.setattr(build, "find_gpu", lambda: gpu)
    monkeypatch.setattr(compile_tensorrt, "find_gpu", lambda: gpu)
