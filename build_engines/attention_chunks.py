"""Attention a chunk of queries at a time, where ONNX Runtime would hold the scores of all pairs of tokens.

Its CPU kernel writes them out, in float32: 32 heads over 5,280 tokens are 3.6 GB, 40 over 32,760 are 172 GB.
The output of a query does not depend on other queries, so chunks compute the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .float32_graph import shapes_in

_SCORE_BYTES = 256 << 20
_MOST_CHUNKS = 256

_Shapes = Mapping[str, Sequence[int]]


def chunk_attention(model: onnx.ModelProto, score_bytes: int = _SCORE_BYTES) -> None:
    """Splits each attention of a graph, in place, so that a row's float32 scores take about `score_bytes`.

    More than 256 chunks are not made. Nodes stay as they are if their shapes are not known.
    """
    graph = model.graph
    shapes = shapes_in(graph)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        sizes = _sizes(node, shapes, score_bytes) if node.op_type == "Attention" else []
        nodes += _chunks(graph, node, shapes, sizes) if len(sizes) > 1 else [node]
    del graph.node[:]
    graph.node.extend(nodes)


def _sizes(node: onnx.NodeProto, shapes: _Shapes, score_bytes: int) -> list[int]:
    """How many queries each chunk has."""
    query, key = (shapes.get(name, ()) for name in node.input[:2])
    is_known = len(query) == len(key) == 4 and all(mask in shapes for mask in node.input[3:] if mask)
    if not is_known or len(node.output) != 1 or len(node.input) > 4:
        return []
    if any(attribute.name == "is_causal" and attribute.i for attribute in node.attribute):
        return []
    (_, heads, queries, _), keys = query, key[2]
    size = max(score_bytes // (4 * heads * keys), -(-queries // _MOST_CHUNKS))
    return [min(size, queries - start) for start in range(0, queries, size)]


def _chunks(
    graph: onnx.GraphProto, node: onnx.NodeProto, shapes: _Shapes, sizes: Sequence[int]
) -> Iterator[onnx.NodeProto]:
    """Queries, and a mask of their length, are split; keys and values are whole."""
    query, masks = node.input[0], node.input[3:]
    lengths = f"{node.name}/chunks"
    graph.initializer.append(numpy_helper.from_array(np.array(sizes), lengths))
    parts = {}
    for name in [query, *(mask for mask in masks if mask and shapes[mask][-2] != 1)]:
        parts[name] = [f"{node.name}/{name}/chunk_{i}" for i in range(len(sizes))]
        yield helper.make_node("Split", [name, lengths], parts[name], axis=2)
    outputs = []
    for i, size in enumerate(sizes):
        chunk = onnx.NodeProto()
        chunk.CopyFrom(node)
        chunk.name = f"{node.name}/chunk_{i}"
        chunk.input[:] = [parts[name][i] if name in parts else name for name in node.input]
        chunk.output[:] = [f"{chunk.name}/output"]
        outputs.append(chunk.output[0])
        graph.value_info.append(_shortened(graph, query, chunk.input[0], size))
        yield chunk
    yield helper.make_node("Concat", outputs, node.output, axis=2)


def _shortened(graph: onnx.GraphProto, whole: str, name: str, length: int) -> onnx.ValueInfoProto:
    """The type of queries, as of the whole, but for their number."""
    info = onnx.ValueInfoProto()
    info.CopyFrom(next(one for one in (*graph.value_info, *graph.input) if one.name == whole))
    info.name = name
    info.type.tensor_type.shape.dim[2].dim_value = length
    return info
