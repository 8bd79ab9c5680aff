"""What the backends that compile ONNX graphs share: the export, and the gate on the graph itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
import torch
from torch import Tensor

from stg_trt.engines.key import digest
from stg_trt.engines.onnxruntime import run_session
from stg_trt.models.families.base import SegmentModule
from stg_trt.models.segment import Segment
from stg_trt.system.files import file_sha256

from .compiler import Compiler, Exported, Job, Run
from .export import export, files_of
from .float32_graph import widen
from .plugin_nodes import qk_norm_rope


@dataclass(frozen=True)
class ExportedGraph(Exported):
    """An ONNX graph, with its weights inside or beside it."""

    graph: Path = Path()


class OnnxCompiler(Compiler):
    """The numerics gate runs ONNX Runtime on the graph that all targets are compiled from."""

    opset = 23

    def export(self, job: Job, modules: Iterator[tuple[Segment, SegmentModule]]) -> ExportedGraph:
        """Writes the segment's graph."""
        graph = job.work / f"{job.segment.name}.onnx"
        _, module = next(modules)
        if "qk_norm_rope" in self.options.plugins:
            module.qk_norm_rope = qk_norm_rope
        export(module, job.inputs, graph, opset=self.opset, max_rows=job.rows[2])
        sha256 = digest({path.name: file_sha256(path) for path in files_of(graph)})
        return ExportedGraph(sha256, lambda: graph_runner(self._runnable(graph)), graph)

    def _runnable(self, graph: Path) -> Path:
        """The graph as ONNX Runtime's CPU provider can run it."""
        if self.options.workload.precision == "fp32" and not self.options.plugins:
            return graph
        widened = graph.with_name(f"{graph.stem}.float32.onnx")
        widen(graph, widened)
        return widened


def graph_runner(path: Path) -> Run:
    """A float32 graph in ONNX Runtime on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # It would hold a second copy of all weights, in the order that its kernels read them.
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        outputs = run_session(lambda run_options: session.run(None, feed, run_options))
        return [torch.from_numpy(output) for output in outputs]

    return run
