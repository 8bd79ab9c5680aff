"""Weights leave memory as they come, once they are more than a graph should hold."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

from stg_trt.build_engines import graph_weights
from stg_trt.build_engines.graph_weights import GraphWeights

SHAPES = ((40, 30), (7,), (33, 3), (64, 64))


def weights(count: int) -> list[Tensor]:
    """Random ones, in bfloat16 and float32 by turns."""
    made = [torch.randn(SHAPES[place % len(SHAPES)]) for place in range(count)]
    return [tensor.bfloat16() if place % 2 else tensor for place, tensor in enumerate(made)]


def add(tensors: list[Tensor], file: Path) -> list[ir.Value]:
    collected = GraphWeights(file)
    values = [
        ir.val(f"w{place}", const_value=tensor_adapters.TorchTensor(tensor, f"w{place}"))
        for place, tensor in enumerate(tensors)
    ]
    for value in values:
        collected.add(value)
    return values


def raw(value: ir.Value) -> bytes:
    assert value.const_value is not None
    return value.const_value.tobytes()


@pytest.mark.parametrize("embedded_bytes", [0, 5000, 1 << 20])
def test_every_weight_is_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded_bytes: int
) -> None:
    monkeypatch.setattr(graph_weights, "_EMBEDDED_BYTES", embedded_bytes)
    tensors, file = weights(9), tmp_path / "graph.onnx.data"
    values = add(tensors, file)
    assert file.exists() == (embedded_bytes < 1 << 20)
    for tensor, value in zip(tensors, values, strict=True):
        assert raw(value) == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert value.const_value is not None and value.const_value.dtype == value.dtype
    written = [v.const_value for v in values if isinstance(v.const_value, ir.ExternalTensor)]
    # Readers map them; those of a few bytes stay in the graph.
    assert all(tensor.offset is not None and tensor.offset % 4096 == 0 for tensor in written)
    assert len(written) == (sum(t.nbytes > 64 for t in tensors) if file.exists() else 0)


def test_what_is_written_is_no_longer_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_weights, "_EMBEDDED_BYTES", 0)
    tensors = [torch.randn(64, 64) for _ in range(3)]
    seen = [weakref.ref(tensor) for tensor in tensors]
    values = add(tensors, tmp_path / "graph.onnx.data")
    tensors.clear()
    gc.collect()
    assert len(values) == 3 and not any(tensor() is not None for tensor in seen)
