"""ONNX Runtime runs the graph itself: compiling is counting what the session will fuse."""

from __future__ import annotations

from importlib.metadata import version

import onnx
import onnx_ir as ir

from .compiler import Compiled, Exported, Job
from .joined_graph import files_of
from .onnx_compiler import ExportedGraph, OnnxCompiler
from .onnxruntime_graph import fuse_rotations
from .reproduction import onnxruntime_command
from .reusable_files import ReusableFiles


class OnnxRuntimeCompiler(OnnxCompiler):
    """The exported graph is the engine."""

    expand_masks = True

    @property
    def version(self) -> str:
        """ONNX Runtime's."""
        return version("onnxruntime")

    def rewrite(self, graph: ir.Graph) -> None:
        """Rotary embeddings as one operator."""
        super().rewrite(graph)
        fuse_rotations(graph)

    def compile(self, job: Job, exported: Exported, target: str, finished: ReusableFiles) -> Compiled:
        """Each Attention node is one kernel of ONNX Runtime."""
        assert isinstance(exported, ExportedGraph)
        model = onnx.load(exported.graph, load_external_data=False)
        fused = sum(node.op_type == "Attention" for node in model.graph.node)
        command = onnxruntime_command(exported.graph, job.inputs, job.rows[1])
        return Compiled(tuple(files_of(exported.graph)), fused, None, commands=(command,))
