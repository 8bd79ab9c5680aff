"""A graph with ONNX Runtime's own operators where they are faster on a CPU than what they replace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .graph_constants import constant

_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class Rotation:
    """The nodes of one `rotate` of the model families: where they end, and what they read.

    `tokens_first` says whether the source has its tokens before its heads, (rows, tokens, heads, channels),
    and not between its heads and channels. The tables are (tokens, pairs).
    """

    end: ir.Node
    source: ir.Value
    tables: tuple[ir.Value, ir.Value]
    tokens_first: bool


def fuse_rotations(graph: ir.Graph) -> int:
    """Replaces rotations by the operator for them, one pass over memory for a dozen; how many there were.

    The operator has one table for all heads: rotations with a table for each stay as they are.
    """
    found = [rotation for node in graph if (rotation := _rotation(node)) is not None]
    for rotation in found:
        _fuse(graph, rotation)
    if found:
        graph.opset_imports[_DOMAIN] = 1
    return len(found)


def _rotation(end: ir.Node) -> Rotation | None:
    """The rotation that ends with a node which joins (a*cos - b*sin, b*cos + a*sin) as pairs."""
    first, second = (_input(_maker(half, "Unsqueeze"), 0) for half in _two(end, "Concat"))
    products = [*_two(_maker(first, "Sub")), *_two(_maker(second, "Add"))]
    (a, cos), (b, sin), *others = (_two(_maker(product, "Mul")) for product in products)
    if None in (a, b, cos, sin) or others != [(b, cos), (a, sin)]:
        return None
    sources = [_input(_maker(_input(_maker(half, "Squeeze"), 0), "Slice"), 0) for half in (a, b)]
    source = _input(_maker(sources[0], "Reshape"), 0)
    tables = [_input(_maker(table, "Unsqueeze"), 0) for table in (cos, sin)]
    tokens_first = None not in tables
    tables = tables if tokens_first else [cos, sin]
    if source is None or sources[0] is not sources[1] or {_rank(table) for table in tables} != {2}:
        return None
    cos, sin = tables
    assert cos is not None and sin is not None
    return Rotation(end, source, (cos, sin), tokens_first)


def _fuse(graph: ir.Graph, rotation: Rotation) -> None:
    """It reads (rows, heads, tokens, channels), or (rows, tokens, channels of all heads)."""
    end, x = rotation.end, rotation.source
    if rotation.tokens_first and _rank(x) != 3:
        x = _flat_heads(graph, end, x)
    start = constant(graph, f"{end.name}/start", np.zeros(1, np.int64))
    by_neighbours = ir.AttrInt64("interleaved", 1)
    inputs = [x, start, *rotation.tables]
    node = ir.Node(_DOMAIN, "RotaryEmbedding", inputs, [by_neighbours], name=f"{end.name}/rotary")
    graph.insert_before(end, node)
    (rotated,) = node.outputs
    rotated.shape, rotated.type = x.shape, x.type
    # What follows is a reshape of the pairs, which takes this as well.
    ir.convenience.replace_all_uses_with(end.outputs[0], rotated)


def _flat_heads(graph: ir.Graph, before: ir.Node, x: ir.Value) -> ir.Value:
    """(rows, tokens, heads, channels) as (rows, tokens, channels of all heads)."""
    shape = constant(graph, f"{before.name}/flat", np.array([0, 0, -1]))
    node = ir.Node("", "Reshape", [x, shape], name=f"{before.name}/flat_heads")
    graph.insert_before(before, node)
    assert x.shape is not None
    rows, tokens, heads, channels = x.shape
    node.outputs[0].shape = ir.Shape([rows, tokens, int(heads) * int(channels)])  # type: ignore[arg-type]
    node.outputs[0].type = x.type
    return node.outputs[0]


def _maker(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes the value, if it is of that type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _input(node: ir.Node | None, place: int) -> ir.Value | None:
    return node.inputs[place] if node is not None else None


def _two(node: ir.Node | None, op_type: str | None = None) -> tuple[ir.Value | None, ir.Value | None]:
    """The inputs of a node that has two, and is of that type."""
    if node is None or len(node.inputs) != 2 or op_type not in (None, node.op_type):
        return None, None
    first, second = node.inputs
    return first, second


def _rank(value: ir.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None
