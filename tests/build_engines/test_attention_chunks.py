"""Attention a chunk of queries at a time is the attention."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from stg_trt.build_engines.attention_chunks import chunk_attention
from stg_trt.build_engines.float32_graph import widen

HEADS, QUERIES, KEYS, CHANNELS = 2, 37, 23, 16


def attention(mask_rows: int | None, *, is_causal: bool = False) -> onnx.ModelProto:
    """With a mask of as many queries, or of one for all, or none."""
    shapes = {
        "query": ["rows", HEADS, QUERIES, CHANNELS],
        "key": ["rows", HEADS, KEYS, CHANNELS],
        "value": ["rows", HEADS, KEYS, CHANNELS],
    }
    if mask_rows is not None:
        shapes["mask"] = ["rows", 1, mask_rows, KEYS]
    node = helper.make_node("Attention", [*shapes], ["out"], "attend", scale=0.3, is_causal=int(is_causal))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "one",
        [info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [info("out", TensorProto.FLOAT, shapes["query"])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def outputs(model: onnx.ModelProto, feed: dict[str, Any]) -> Any:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def inputs(mask_rows: int | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    feed = {"query": torch.randn(3, HEADS, QUERIES, CHANNELS)}
    feed |= {name: torch.randn(3, HEADS, KEYS, CHANNELS) for name in ("key", "value")}
    if mask_rows is not None:
        feed["mask"] = torch.randn(3, 1, mask_rows, KEYS)
    return feed


@pytest.mark.parametrize("mask_rows", [None, 1, QUERIES])
@pytest.mark.parametrize(("queries", "chunks"), [(1, 37), (10, 4), (36, 2), (37, 1), (1000, 1)])
def test_chunks_compute_the_attention(mask_rows: int | None, queries: int, chunks: int) -> None:
    model, feed = attention(mask_rows), inputs(mask_rows)
    chunk_attention(model, score_bytes=4 * HEADS * KEYS * queries)
    onnx.checker.check_model(model, full_check=True)
    # ONNX Runtime's kernel wants masks of all queries of its node.
    widen(model)
    assert sum(node.op_type == "Attention" for node in model.graph.node) == chunks
    got = torch.from_numpy(outputs(model, {name: tensor.numpy() for name, tensor in feed.items()}))
    expected = torch.nn.functional.scaled_dot_product_attention(
        feed["query"], feed["key"], feed["value"], feed.get("mask"), scale=0.3
    )
    assert (got - expected).norm() / expected.norm() <= 1e-5


def test_there_are_at_most_256_chunks() -> None:
    model = attention(None)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[2].dim_value = 1000
    chunk_attention(model, score_bytes=1)
    assert sum(node.op_type == "Attention" for node in model.graph.node) == 250


def test_a_causal_attention_stays_whole() -> None:
    """Its mask depends on a query's place."""
    model = attention(None, is_causal=True)
    chunk_attention(model, score_bytes=1)
    assert [node.op_type for node in model.graph.node] == ["Attention"]
