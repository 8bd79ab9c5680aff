"""Rotary embeddings as ONNX Runtime's operator, and what a graph has instead of full-sized ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from stg_trt.build_engines.export import export
from stg_trt.build_engines.joined_graph import JoinedGraph
from stg_trt.build_engines.onnx_compiler import TRACED_MAX_ROWS, OnnxCompiler
from stg_trt.build_engines.onnxruntime_graph import fuse_rotations
from stg_trt.build_engines.piece_key import PieceKey
from stg_trt.models.segment import Segment
from tests.support.family_cases import COGVIDEOX, HUNYUAN_VIDEO, LTX, MOCHI, WAN, FamilyCase

BLOCK = Segment("block", 1, 2)
# Queries and keys of the video; in HunyuanVideo's blocks of one stream too. Mochi has a table for every head,
# and CogVideoX 2B no rotary embedding.
ROTATIONS = [(LTX, 2), (WAN, 2), (HUNYUAN_VIDEO, 2), (COGVIDEOX["5b"], 2), (COGVIDEOX["2b"], 0), (MOCHI, 0)]


def joined(case: FamilyCase, path: Path) -> JoinedGraph:
    family, workload = case.family, case.workload
    inputs = family.inputs(BLOCK, workload)
    module = family.module(case.checkpoint.load_transformer(BLOCK.blocks), BLOCK, expand_masks=True).eval()
    key = PieceKey.of(module, inputs, family.outputs(BLOCK, workload), TRACED_MAX_ROWS)
    graphs = OnnxCompiler._graphs
    if key not in graphs:
        graphs[key] = export("block", module, inputs, opset=23, max_rows=TRACED_MAX_ROWS)
    graph = JoinedGraph(inputs, path)
    graph.append("block", graphs[key], module)
    return graph


@pytest.mark.slow(reason="exports a block of every family")
@pytest.mark.parametrize(("case", "count"), ROTATIONS, ids=str)
def test_rotations_become_one_operator(case: FamilyCase, count: int, tmp_path: Path) -> None:
    outputs, found = case.family.borders(BLOCK)[1], []
    paths = tmp_path / "as_exported.onnx", tmp_path / "fused.onnx"
    joined(case, paths[0]).save(outputs)
    joined(case, paths[1]).save(outputs, lambda graph: found.append(fuse_rotations(graph)))
    kinds = [node.op_type for node in onnx.load(paths[1]).graph.node]
    assert found == [count] and kinds.count("RotaryEmbedding") == count
    sessions = [ort.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in paths]
    names = case.family.borders(BLOCK)[0]
    for rows in (1, 3):
        inputs = case.family.trace_inputs(BLOCK, case.workload, rows)
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        for got, wanted in zip(*(session.run(None, feed) for session in sessions), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_other_joins_are_kept() -> None:
    """Pairs that are turned the other way, and pairs of two sources."""
    for line, other in (("Sub (a_cos", "Add (a_cos"), ("Mul (b, cos)", "Mul (b, sin)")):
        graph = rotation(line, other)
        assert fuse_rotations(graph) == 0 and "com.microsoft" not in graph.opset_imports
    assert fuse_rotations(rotation()) == 1


def rotation(line: str = "", other: str = "") -> ir.Graph:
    """That of the exporter, (rows, tokens, channels) by tables of (tokens, pairs), with one line changed."""
    text = """
        <ir_version: 10, opset_import: ["" : 23]>
        rotation (float[R,4,6] x, float[4,3] cos, float[4,3] sin) => (float[R,4,6] y)
        <int64[4] by_pair = {0, 4, 3, 2}, int64[3] flat = {0, 0, 6}, int64[1] zero = {0}, int64[1] one = {1},
         int64[1] two = {2}, int64[1] last = {3}> {
            pairs = Reshape (x, by_pair)
            even = Slice (pairs, zero, one, last)
            a = Squeeze (even, last)
            odd = Slice (pairs, one, two, last)
            b = Squeeze (odd, last)
            a_cos = Mul (a, cos)
            b_sin = Mul (b, sin)
            first = Sub (a_cos, b_sin)
            b_cos = Mul (b, cos)
            a_sin = Mul (a, sin)
            second = Add (b_cos, a_sin)
            first_ = Unsqueeze (first, last)
            second_ = Unsqueeze (second, last)
            stack = Concat <axis = -1> (first_, second_)
            y = Reshape (stack, flat)
        }
    """
    graph: ir.Graph = ir.from_proto(
        onnx.parser.parse_model(text.replace(line, other) if line else text)
    ).graph
    return graph


def test_norms_without_a_weight_share_one_scale(tmp_path: Path) -> None:
    """The exporter makes ones of the size of all hidden states for each, in every run."""
    path = tmp_path / "block.onnx"
    joined(LTX, path).save(LTX.family.borders(BLOCK)[1])
    graph = onnx.load(path).graph
    assert "ConstantOfShape" not in {node.op_type for node in graph.node}
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    scales = [node.input[1] for node in graph.node if node.op_type == "RMSNormalization"]
    width = LTX.family.integer("num_attention_heads") * LTX.family.integer("attention_head_dim")
    assert len(scales) == 6 and {tuple(sizes[scale]) for scale in scales} == {(width,)}
