"""What the backends that compile ONNX graphs share: the export, and the gate on the graph itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from stg_trt.engines.key import digest
from stg_trt.engines.onnxruntime import run_session, session_options
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import Segment
from stg_trt.system.files import file_sha256

from .compiler import Compiler, Exported, Job, Run
from .export import PieceGraph, export
from .float32_graph import write_float32_graph
from .joined_graph import JoinedGraph, files_of
from .piece_key import PieceKey
from .plugin_nodes import qk_norm_rope

_log = logging.getLogger(__name__)
# A graph takes any number of rows; one bound for all segments lets them share their pieces' graphs.
TRACED_MAX_ROWS = 1024


@dataclass(frozen=True)
class ExportedGraph(Exported):
    """An ONNX graph, with its weights inside or beside it."""

    graph: Path = Path()


class OnnxCompiler(Compiler):
    """The numerics gate runs ONNX Runtime on the graph that all targets are compiled from."""

    opset = 23

    # Of all builds of this process; without weights, so that keeping them takes little memory.
    _graphs: ClassVar[dict[PieceKey, PieceGraph]] = {}

    def export(self, job: Job, modules: Iterator[tuple[Segment, SegmentModule]]) -> ExportedGraph:
        """Joins the graphs of the segment's pieces, of which equal ones are exported once."""
        joined = JoinedGraph(job.inputs)
        for piece, module in modules:
            if "qk_norm_rope" in self.options.plugins:
                module.qk_norm_rope = qk_norm_rope
            joined.append(piece.name, self._graph(job, piece, module), module)
        path = job.work / f"{job.segment.name}.onnx"
        joined.save(path, tuple(spec.name for spec in job.outputs), self.rewrite)
        sha256 = digest({file.name: file_sha256(file) for file in files_of(path)})
        return ExportedGraph(sha256, lambda: graph_runner(self._runnable(path)), path)

    def rewrite(self, graph: ir.Graph) -> None:
        """Changes a segment's graph, in place, for the backend; the gates see the result."""

    def _graph(self, job: Job, piece: Segment, module: SegmentModule) -> PieceGraph:
        key = self.piece_key(piece, module, max(job.rows[2], TRACED_MAX_ROWS))
        name = job.segment.name
        if key in self._graphs:
            _log.info("%s: %s has the graph of an earlier piece", name, piece.name)
        else:
            _log.info("%s: exporting %s", name, piece.name)
            self._graphs[key] = export(name, module, key.inputs, opset=self.opset, max_rows=key.max_rows)
        return self._graphs[key]

    def _runnable(self, graph: Path) -> Path:
        """The graph as ONNX Runtime's CPU provider can run it."""
        if self.options.workload.precision == "fp32" and not self.options.plugins:
            return graph
        widened = graph.with_name(f"{graph.stem}.float32.onnx")
        write_float32_graph(graph, widened)
        return widened


def graph_runner(path: Path) -> Run:
    """A float32 graph in ONNX Runtime on the CPU."""
    options = session_options()
    # It would hold a second copy of all weights, in the order that its kernels read them.
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        outputs = run_session(lambda run_options: session.run(None, feed, run_options))
        return [torch.from_numpy(output) for output in outputs]

    return run
