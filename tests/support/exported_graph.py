"""A module's ONNX graph as a build writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stg_trt.build_engines.export import export
from stg_trt.build_engines.joined_graph import JoinedGraph
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.tensor_spec import TensorSpec


def export_alone(
    module: SegmentModule, inputs: Sequence[TensorSpec], path: Path, *, opset: int = 23, max_rows: int = 6
) -> None:
    """Writes the graph of a segment of one piece."""
    graph = JoinedGraph(inputs)
    graph.append("alone", export(path.stem, module, inputs, opset=opset, max_rows=max_rows), module)
    graph.save(path, module.outputs)
