"""A module's ONNX graph, and a segment's of its pieces, as a build writes them."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from pathlib import Path

from stg_trt.build_engines.export import PieceGraph, export
from stg_trt.build_engines.joined_graph import JoinedGraph
from stg_trt.build_engines.onnx_compiler import TRACED_MAX_ROWS
from stg_trt.build_engines.piece_key import PieceKey
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import TensorSpec
from stg_trt.models.workload import Workload

Graphs = MutableMapping[PieceKey, PieceGraph]


def export_alone(
    module: SegmentModule, inputs: Sequence[TensorSpec], path: Path, *, opset: int = 23, max_rows: int = 6
) -> None:
    """Writes the graph of a segment of one piece."""
    graph = JoinedGraph(inputs, path)
    graph.append("alone", export(path.stem, module, inputs, opset=opset, max_rows=max_rows), module)
    graph.save(module.outputs)


def write_graph(
    checkpoint: Checkpoint,
    workload: Workload,
    segment: Segment,
    pieces: Sequence[Segment],
    path: Path,
    graphs: Graphs,
) -> set[PieceKey]:
    """Writes the segment's graph, joined from those of `pieces`; the kinds of them. `graphs` are exported."""
    family, transformer, kinds = checkpoint.family, checkpoint.load_transformer(), set()
    joined = JoinedGraph(family.inputs(segment, workload), path)
    for piece in pieces:
        module = family.module(transformer, piece, expand_masks=True).eval()
        inputs, outputs = family.inputs(piece, workload), family.outputs(piece, workload)
        key = PieceKey.of(module, inputs, outputs, TRACED_MAX_ROWS)
        if key not in graphs:
            graphs[key] = export("seg", module, inputs, opset=23, max_rows=TRACED_MAX_ROWS)
        kinds.add(key)
        joined.append(piece.name, graphs[key], module)
    joined.save(family.borders(segment)[1])
    return kinds
