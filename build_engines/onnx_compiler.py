"""What the backends that compile ONNX graphs share: the export, and the gate on the graph itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from stg_trt.engines.key import digest, export_version
from stg_trt.engines.onnxruntime import run_session, session_options
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import Segment
from stg_trt.system.files import file_sha256

from .attention_chunks import chunk_attention
from .compiler import FLOAT8, FLOAT32, Compiler, Exported, Job, Run, SegmentExport, Tolerance
from .export import PieceGraph, export, weight_name
from .float8_graph import share_quantizers
from .float32_graph import widen
from .joined_graph import JoinedGraph, files_of
from .kept_graphs import KeptGraphs
from .options import BuildOptions
from .piece_key import PieceKey
from .plugin_nodes import qk_norm_rope
from .weights import weights_of

_log = logging.getLogger(__name__)
# A graph takes any number of rows; one bound for all segments lets them share their pieces' graphs.
TRACED_MAX_ROWS = 1024


@dataclass(frozen=True)
class ExportedGraph(Exported):
    """An ONNX graph, with its weights inside or beside it; `weights` are the checkpoint's."""

    graph: Path = Path()
    weights: frozenset[str] = frozenset()


class OnnxCompiler(Compiler):
    """The numerics gate runs ONNX Runtime on the graphs of pieces, which the segment's is joined from."""

    opset = 23

    # Of all builds of this process; without weights, so that keeping them takes little memory.
    _graphs: ClassVar[dict[PieceKey, PieceGraph]] = {}

    def __init__(self, options: BuildOptions) -> None:
        super().__init__(options)
        self._sessions: dict[PieceGraph, ort.InferenceSession] = {}
        version = export_version(options.checkpoint.family)
        self._kept = KeptGraphs(options.output, {"export_version": version, "opset": self.opset})
        self._exported: set[PieceKey] = set()
        self._used: dict[PieceKey, PieceGraph] = {}

    def export(self, job: Job) -> OnnxExport:
        """Joins the graphs of the segment's pieces, of which equal ones are exported once."""
        return OnnxExport(self, job)

    @property
    def tolerance(self) -> Tolerance:
        """Of a graph in float32, whatever the engine's precision."""
        return FLOAT8 if self.options.workload.is_float8 else FLOAT32

    def rewrite(self, graph: ir.Graph) -> None:
        """Changes a graph, in place, for the backend; the gates see the result."""
        if self.options.workload.is_float8:
            share_quantizers(graph)

    def graph_of(self, job: Job, piece: Segment, module: SegmentModule) -> PieceGraph:
        """That of any piece of the kind, in an earlier build too; exported if there is none."""
        key = self.piece_key(piece, module, max(job.rows[2], TRACED_MAX_ROWS))
        name = job.segment.name
        graph = self._graphs.get(key)
        if graph is not None:
            _log.info("%s: %s has the graph of an earlier piece", name, piece.name)
        elif (graph := self._kept.read(key, module)) is not None:
            _log.info("%s: %s has the graph that an earlier build kept", name, piece.name)
        else:
            _log.info("%s: exporting %s", name, piece.name)
            graph = export(name, module, key.inputs, opset=self.opset, max_rows=key.max_rows)
            self._exported.add(key)
        self._graphs[key] = self._used[key] = graph
        return graph

    @property
    def has_exported(self) -> bool:
        """Whether this build made a graph of the segment at hand, or of one before, that it uses here."""
        return not self._exported.isdisjoint(self._used)

    def keep(self, work: Path) -> None:
        """Keeps the graphs of the pieces in the finished segment, which have passed its gates."""
        for key, graph in self._used.items():
            self._kept.write(key, graph, work)
        self._used.clear()

    def runner(self, graph: PieceGraph, module: SegmentModule) -> Run:
        """The graph of a piece with its weights in float32; pieces of one kind share a session."""
        if graph not in self._sessions:
            self._sessions[graph] = open_session(self._runnable(graph))
        return session_runner(self._sessions[graph], fed_weights(module))

    def _runnable(self, piece: PieceGraph) -> onnx.ModelProto:
        """The graph, rewritten as the segment's is, as ONNX Runtime's CPU provider can run it."""
        graph = piece.graph.clone()
        self.rewrite(graph)
        model = ir.to_proto(ir.Model(graph, ir_version=piece.ir_version))
        if self.options.workload.dtype != "float32" or self.options.plugins:
            chunk_attention(model)
            widen(model)
        return model


class OnnxExport(SegmentExport):
    """The graph of a segment while it is joined."""

    def __init__(self, compiler: OnnxCompiler, job: Job) -> None:
        self._compiler = compiler
        self._job = job
        self._path = job.work / f"{job.segment.name}.onnx"
        self._joined = JoinedGraph(job.inputs, self._path)

    def append(self, piece: Segment, module: SegmentModule) -> Callable[[], Run]:
        if "qk_norm_rope" in self._compiler.options.plugins:
            module.qk_norm_rope = qk_norm_rope
        graph = self._compiler.graph_of(self._job, piece, module)
        self._joined.append(piece.name, graph, module)
        return lambda: self._compiler.runner(graph, module)

    def finish(self) -> ExportedGraph:
        self._joined.save(tuple(spec.name for spec in self._job.outputs), self._compiler.rewrite)
        return ExportedGraph(
            digest({file.name: file_sha256(file) for file in files_of(self._path)}),
            not self._compiler.has_exported,
            self._path,
            self._joined.weights,
        )


def open_session(model: onnx.ModelProto) -> ort.InferenceSession:
    """A graph in ONNX Runtime on the CPU."""
    options = session_options()
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def fed_weights(module: SegmentModule) -> dict[str, np.ndarray | ort.OrtValue]:
    """A piece's weights by the names that its graph's inputs have."""
    return {weight_name(place): _fed(tensor) for place, (_, tensor) in enumerate(weights_of(module))}


def _fed(tensor: Tensor) -> np.ndarray | ort.OrtValue:
    """A weight as a session takes it, in float32 or FP8, which numpy does not have."""
    if tensor.dtype == torch.float8_e4m3fn:
        values = tensor.view(torch.uint8).numpy()
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(values, onnx.TensorProto.FLOAT8E4M3FN)
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def session_runner(session: ort.InferenceSession, weights: Mapping[str, np.ndarray | ort.OrtValue]) -> Run:
    """Calls the session with the inputs, and with these weights, which are inputs of its graph too."""

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        feed = {**weights, **{name: tensor.numpy() for name, tensor in inputs.items()}}

        def call(options: ort.RunOptions) -> list[np.ndarray]:
            # Memory goes from node to node, but not to the next stage of the build.
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
            outputs: list[np.ndarray] = session.run(None, feed, options)
            return outputs

        outputs = run_session(call)
        return [torch.from_numpy(output) for output in outputs]

    return run
