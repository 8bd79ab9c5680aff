"""Blocks are exported once of each kind: joined, they are the graph that the whole segment exports as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from stg_trt.build_engines.onnx_compiler import OnnxCompiler
from stg_trt.build_engines.pieces import pieces_of
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.segment import Segment
from stg_trt.models.workload import Workload
from tests.support.exported_graph import write_graph
from tests.support.family_cases import CASES, COGVIDEOX, HUNYUAN_VIDEO, MOCHI, FamilyCase
from tests.support.family_cases.case import GOLDENS
from tests.support.graph_structure import first_difference
from tests.support.tiny_svd import SVD

ROWS = 3


@dataclass(frozen=True)
class Case:
    """A run of blocks that has every kind of a family's, and what comes before and after it."""

    name: str
    checkpoint: Checkpoint
    workload: Workload
    segment: Segment

    def write(self, pieces: Sequence[Segment], path: Path) -> Path:
        write_graph(self.checkpoint, self.workload, self.segment, pieces, path, OnnxCompiler._graphs)
        return path

    def outputs(self, graph: Path) -> list[np.ndarray]:
        """What ONNX Runtime makes of random inputs, always the same."""
        family = self.checkpoint.family
        names = [spec.name for spec in family.inputs(self.segment, self.workload)]
        tensors = family.trace_inputs(self.segment, self.workload, ROWS)
        session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        found: list[np.ndarray] = session.run(
            None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        )
        return found


def of_family(case: FamilyCase, start: int) -> Case:
    """Two blocks between embedding and head."""
    segment = Segment("normal", start, start + 2, front=True, back=True)
    return Case(str(case), case.checkpoint, case.workload, segment)


def of_svd(place: int) -> Case:
    """The first or last segment, which have embedding or head and one block, with layers of no number."""
    checkpoint, (first, last) = Checkpoint.open(SVD), (1, SVD_BLOCKS - 2)
    segment = checkpoint.family.segments("segmented", "stg-r", (first, last))[place]
    return Case(f"svd_{segment.name}", checkpoint, Workload(64, 64, 4, 0), segment)


def of_open_sora() -> Case:
    """A block inside frames, and one along time."""
    segment = Segment("normal", 2, 4, front=True, back=True)
    sizes = Workload(64, 96, 34, 12)
    return Case("open_sora", Checkpoint.open(GOLDENS / "open_sora"), sizes, segment)


def of_ltx2() -> Case:
    """Two streams, with gates and a modulated prompt."""
    segment = Segment("normal", 1, 3, front=True, back=True, keep_input=True)
    sizes = Workload(128, 160, 17, 8, audio_num_frames=18)
    return Case("ltx2", Checkpoint.open(GOLDENS / "ltx2_3"), sizes, segment)


SVD_BLOCKS = 8
PLACES = {
    # Their last block is of a kind of its own.
    MOCHI: MOCHI.family.num_blocks - 2,
    # After the last block with weights for each stream comes one with one set for both.
    HUNYUAN_VIDEO: 1,
}
SEGMENTS = [
    # The blocks of CogVideoX 5B are those of 1.5.
    *(of_family(case, PLACES.get(case, 1)) for case in CASES if case is not COGVIDEOX["5b"]),
    of_open_sora(),
    of_ltx2(),
    of_svd(0),
    of_svd(-1),
]


@pytest.mark.slow(reason="exports segments of every family as one")
@pytest.mark.parametrize("case", SEGMENTS, ids=lambda case: case.name)
def test_joined_pieces_are_the_whole_segment(case: Case, tmp_path: Path) -> None:
    """Up to names, and bit for bit: nothing of a block depends on its place in the model."""
    pieces = pieces_of(case.segment)
    assert len(pieces) > 1
    joined = case.write(pieces, tmp_path / "joined.onnx")
    whole = case.write([case.segment], tmp_path / "whole.onnx")
    assert first_difference(ir.load(joined).graph, ir.load(whole).graph) is None
    for one, other in zip(case.outputs(joined), case.outputs(whole), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("case", SEGMENTS, ids=lambda case: case.name)
def test_a_block_needs_the_weights_of_no_other_piece(case: Case) -> None:
    """Nor those of embedding and head, but for what the family says that its blocks share."""
    for piece in pieces_of(case.segment):
        transformer = case.checkpoint.load_transformer(piece.blocks, ends=piece.has_ends)
        module = case.checkpoint.family.module(transformer, piece, expand_masks=True)
        assert not [name for name, weight in module.named_parameters() if weight.is_meta]


def scaled(axis: int = -1, factor: float = 2.0, source: str = "x") -> ir.Graph:
    """softmax(x), copied, times a factor."""
    x = ir.Value(name=source, shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    constant = ir.val("factor", const_value=ir.tensor(np.array(factor, np.float32)))
    nodes = [
        soft := ir.node("Softmax", [x], {"axis": axis}),
        copy := ir.node("Identity", soft.outputs),
        product := ir.node("Mul", [copy.outputs[0], constant]),
    ]
    return ir.Graph([x], product.outputs, nodes=nodes, initializers=[constant])


def test_a_difference_is_seen() -> None:
    assert first_difference(scaled(), scaled()) is None
    for other in (scaled(axis=0), scaled(factor=3.0), scaled(source="y")):
        assert first_difference(scaled(), other) is not None
