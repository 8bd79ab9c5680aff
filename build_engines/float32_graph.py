"""A graph made runnable by ONNX Runtime on the CPU: the same graph, in float32 and without plugins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .plugin_nodes import define


def write_float32_graph(path: Path, widened: Path) -> None:
    """Writes the graph of a file as `widen` makes it."""
    model = onnx.load(path)
    widen(model)
    onnx.save(
        model,
        widened,
        save_as_external_data=True,
        location=f"{widened.name}.data",
        size_threshold=1024,
    )


def widen(model: onnx.ModelProto) -> None:
    """Every bfloat16 type becomes float32, and attention masks are expanded to the query length, in place.

    ONNX Runtime's CPU provider has no bfloat16 kernels, and its attention wants full masks.
    """
    graph = model.graph
    for initializer in graph.initializer:
        if initializer.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(initializer).astype(np.float32)
            initializer.CopyFrom(numpy_helper.from_array(values, initializer.name))
    for info in (*graph.input, *graph.output, *graph.value_info):
        if info.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        _widen_attributes(node)
    _expand_masks(graph)
    define(model)


def shapes_in(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """Of a graph's inputs and of what its nodes compute, by name; 0 for an axis that is not fixed."""
    return {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in (*graph.value_info, *graph.input)
    }


def _widen_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
        if attribute.HasField("t") and attribute.t.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(numpy_helper.from_array(values))


def _expand_masks(graph: onnx.GraphProto) -> None:
    """Adds zeros of (1, 1, queries, 1) to each attention mask."""
    shapes = shapes_in(graph)
    nodes = []
    for node in graph.node:
        if node.op_type == "Attention" and len(node.input) > 3 and node.input[3]:
            zeros = np.zeros((1, 1, shapes[node.input[0]][2], 1), np.float32)
            name = f"{node.name}_query_length"
            graph.initializer.append(numpy_helper.from_array(zeros, name))
            nodes.append(helper.make_node("Add", [node.input[3], name], [f"{name}_mask"]))
            node.input[3] = f"{name}_mask"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
