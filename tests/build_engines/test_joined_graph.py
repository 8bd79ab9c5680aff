from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from stg_trt.build_engines.onnx_compiler import OnnxCompiler
from stg_trt.build_engines.pieces import pieces_of
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.segment import Segment
from tests.support.exported_graph import Graphs, write_graph
from tests.support.family_cases import HUNYUAN_VIDEO, LTX, FamilyCase


@pytest.fixture
def graphs() -> Graphs:
    """Exported so far by any test, for builds too."""
    return OnnxCompiler._graphs


@pytest.mark.parametrize(
    ("case", "segment", "kinds"),
    [
        (LTX, Segment("normal", 0, 5, True, True), 3),
        (LTX, Segment("skipped", 0, 5, True, True, skipped=Perturbation("stg-r", (0, 4))), 3),
        (LTX, Segment("mid", 1, 4), 1),
        # Blocks of two streams, then of one.
        pytest.param(
            HUNYUAN_VIDEO,
            Segment("normal", 0, HUNYUAN_VIDEO.family.num_blocks, True, True),
            4,
            marks=pytest.mark.slow(reason="exports the graphs of HunyuanVideo"),
        ),
    ],
    ids=["whole", "two blocks left out", "blocks alone", "two kinds"],
)
def test_a_segment_is_joined_from_kinds_of_pieces(
    case: FamilyCase, segment: Segment, kinds: int, tmp_path: Path, graphs: Graphs
) -> None:
    path = tmp_path / "seg.onnx"
    pieces = pieces_of(segment)
    assert len(write_graph(case.checkpoint, case.workload, segment, pieces, path, graphs)) == kinds
    model = onnx.load(path)
    onnx.checker.check_model(model)
    producers = {output: node for node in model.graph.node for output in node.output}
    # A piece ends with a grid of tokens, and the next one makes tokens of it: neither is left.
    for node in model.graph.node:
        before = producers.get(node.input[0]) if node.op_type == "Reshape" else None
        assert before is None or before.op_type != "Reshape"
    module = case.family.module(case.checkpoint.load_transformer(), segment, expand_masks=True)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows in (1, 3):
        inputs = case.family.trace_inputs(segment, case.workload, rows)
        with torch.no_grad():
            expected = module(*inputs)
        feed = {name: tensor.numpy() for name, tensor in zip(module.inputs, inputs, strict=True)}
        for got, wanted in zip(session.run(None, feed), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow(reason="exports a model twice")
def test_a_graph_is_written_alike_again(tmp_path: Path) -> None:
    """Engines are known by their graph's digest; it has no names of files or lines of this machine."""
    segment = Segment("mid", 1, 3)
    for name in ("once", "again"):
        write_graph(LTX.checkpoint, LTX.workload, segment, pieces_of(segment), tmp_path / name, {})
    once = (tmp_path / "once").read_bytes()
    assert once == (tmp_path / "again").read_bytes()
    assert b".py" not in once
