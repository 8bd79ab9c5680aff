"""An FP8 graph with one quantisation of each tensor: layers that read the same tensor share it."""

from __future__ import annotations

import onnx_ir as ir

_KINDS = ("QuantizeLinear", "DequantizeLinear")


def share_quantizers(graph: ir.Graph) -> int:
    """Merges nodes that quantise one tensor by equal scales, such as those of q, k and v; how many went.

    Compilers join the products of one tensor if they read one node.
    """
    first: dict[tuple[object, ...], ir.Node] = {}
    merged = 0
    for node in [*graph]:
        key = _key(node)
        if key is None:
            continue
        kept = first.setdefault(key, node)
        if kept is not node:
            ir.convenience.replace_all_uses_with(node.outputs[0], kept.outputs[0])
            graph.remove(node, safe=True)
            merged += 1
    return merged


def _key(node: ir.Node) -> tuple[object, ...] | None:
    """What the node computes, if it is known: its input, and its one scale. Weights are not looked at."""
    if node.op_type not in _KINDS or "axis" in node.attributes:
        return None
    x, scale = node.inputs[:2]
    constant = scale.const_value if scale is not None else None
    return None if constant is None else (node.op_type, x, constant.dtype, constant.tobytes())
