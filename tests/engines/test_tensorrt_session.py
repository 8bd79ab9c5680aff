"""One TensorRT engine over a strict stand-in for the library: how it is read, bound and run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from stg_trt.engines import tensorrt
from stg_trt.errors import BackendUnavailable, EngineRejected, OutOfDeviceMemory
from tests.support.simulated_tensorrt import ALIGNMENT, SimulatedTensorRT
from tests.support.tiny_graph import tensors, write_graph


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> SimulatedTensorRT:
    simulated = SimulatedTensorRT(max_rows=6)
    monkeypatch.setattr(tensorrt, "load_library", lambda backend: simulated)
    monkeypatch.setattr(tensorrt, "_ALIGNMENT_BYTES", ALIGNMENT)
    monkeypatch.setattr(tensorrt.TensorRTEngine, "alignment", ALIGNMENT)
    return simulated


def load(folder: Path) -> tensorrt.TensorRTEngine:
    path = write_graph(folder / "text.onnx")
    return tensorrt.load_all("tensorrt", {"text": [path]}, torch.device("cpu"))["text"]


def test_an_engine_is_mapped_and_not_copied(sim: SimulatedTensorRT, tmp_path: Path) -> None:
    context, bound = load(tmp_path).context(), tensors(2)
    for name, tensor in bound.items():
        context.bind(name, tensor)
    context.enqueue(1)
    assert bound["text"].abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "says", "error", "message"),
    [
        (
            "Runtime",
            "CUDA initialization failure with error: 35",
            BackendUnavailable,
            "tensorrt 11.0.0: expected an NVIDIA driver that is new enough for its CUDA version, got an "
            "older one or none: update the driver",
        ),
        (
            "deserialize_cuda_engine",
            "(cudaError 35: CUDA driver version is insufficient for CUDA runtime version)",
            BackendUnavailable,
            "tensorrt 11.0.0: expected an NVIDIA driver that is new enough for its CUDA version, got an "
            "older one or none: update the driver",
        ),
        (
            "deserialize_cuda_engine",
            "Requested amount of GPU memory (4096 bytes) could not be allocated.",
            OutOfDeviceMemory,
            ".*/text.onnx: expected 0.00 GiB of free GPU memory for its weights, got Requested amount of GPU "
            "memory .4096 bytes. could not be allocated.: free some, or use the segmented layout, .*",
        ),
        (
            "deserialize_cuda_engine",
            "The engine plan file is generated on an incompatible device, expecting compute 9.0 got compute "
            "8.0, please rebuild.",
            EngineRejected,
            ".*/text.onnx: expected an engine that tensorrt 11.0.0 can load on this GPU, got The engine plan "
            "file is generated on an incompatible device, expecting compute 9.0 got compute 8.0, please "
            "rebuild.: build the engines again here",
        ),
    ],
    ids=["no driver", "old driver", "memory", "another GPU"],
)
def test_a_refusal_says_why_in_one_line(
    sim: SimulatedTensorRT, tmp_path: Path, call: str, says: str, error: type[Exception], message: str
) -> None:
    sim.failing.add(call)
    sim.says = [says, "[checkMacros.cpp::catchCudaError] a second error that follows from the first"]
    with pytest.raises(error) as caught:
        load(tmp_path)
    assert re.fullmatch(message, str(caught.value))
