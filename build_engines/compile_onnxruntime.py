"""ONNX Runtime runs the graph itself: compiling is counting what the session will fuse."""

from __future__ import annotations

from pathlib import Path

import onnx

from .compiled import Compiled
from .export import files_of


def compile_onnxruntime(graph: Path) -> Compiled:
    """The exported graph is the engine; each Attention node is one kernel of ONNX Runtime."""
    model = onnx.load(graph, load_external_data=False)
    fused = sum(node.op_type == "Attention" for node in model.graph.node)
    return Compiled(tuple(files_of(graph)), fused, None)
