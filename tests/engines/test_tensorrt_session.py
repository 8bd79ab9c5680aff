"""One TensorRT engine over a strict stand-in for the library: how it is read, bound and run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from stg_trt.engines import tensorrt
from stg_trt.errors import BackendUnavailable, EngineRejected, OutOfDeviceMemory
from tests.support.simulated_tensorrt import ALIGNMENT, RuleBroken, SimulatedTensorRT
from tests.support.tiny_graph import tensors, write_graph


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> SimulatedTensorRT:
    simulated = SimulatedTensorRT((1, 6))
    monkeypatch.setattr(tensorrt, "load_library", lambda backend: simulated)
    monkeypatch.setattr(tensorrt, "_ALIGNMENT_BYTES", ALIGNMENT)
    monkeypatch.setattr(tensorrt.TensorRTEngine, "alignment", ALIGNMENT)
    return simulated


def load(folder: Path) -> tensorrt.TensorRTEngine:
    path = write_graph(folder / "text.onnx")
    return tensorrt.load_all("tensorrt", {"text": [path]}, torch.device("cpu"))["text"]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_context_picks_the_profile_of_its_rows(sim: SimulatedTensorRT, tmp_path: Path, rows: int) -> None:
    sim.profiles = ((1, 1), (2, 2), (3, 3))
    context, bound = load(tmp_path).context(), tensors(rows)
    for name, tensor in bound.items():
        context.bind(name, tensor)
    context.enqueue(1)
    assert sim.profiles_used == [rows - 1]
    assert bound["text"].abs().sum() > 0


def test_other_rows_later_are_another_profile(sim: SimulatedTensorRT, tmp_path: Path) -> None:
    sim.profiles = ((1, 1), (2, 2))
    context = load(tmp_path).context()
    for rows in (2, 1, 2):
        bound = tensors(rows)
        for name, tensor in bound.items():
            context.bind(name, tensor)
        context.enqueue(1)
        context.enqueue(1)
        assert bound["text"].abs().sum() > 0
    assert sim.profiles_used == [1, 0, 1]


def test_rows_that_no_profile_has(sim: SimulatedTensorRT, tmp_path: Path) -> None:
    sim.profiles = ((1, 1), (2, 2), (4, 6))
    with pytest.raises(
        EngineRejected,
        match="of shape 1x9x24 or 2x9x24 or 4x9x24 to 6x9x24, got 3x9x24: rebuild with a larger --max-batch",
    ):
        load(tmp_path).context().bind("prompt_embeds", tensors(3)["prompt_embeds"])


def test_the_simulation_is_strict_about_profiles(sim: SimulatedTensorRT, tmp_path: Path) -> None:
    sim.profiles = ((1, 1), (2, 2))
    context = load(tmp_path).engine.create_execution_context("user managed")
    with pytest.raises(RuleBroken, match="a shape was set before the profile"):
        context.set_input_shape("prompt_embeds", (2, 9, 24))
    assert context.set_optimization_profile_async(0, 1)
    assert not context.set_input_shape("prompt_embeds", (2, 9, 24))
    assert context.set_input_shape("prompt_embeds", (1, 9, 24))
    assert context.set_optimization_profile_async(1, 1)
    assert context.infer_shapes() == ["prompt_embeds"]
    with pytest.raises(RuleBroken, match="no profile 2"):
        context.set_optimization_profile_async(2, 1)


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
