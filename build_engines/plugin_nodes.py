"""Nodes of a graph that a TensorRT plugin computes.

ONNX Runtime has no such plugins: it runs the nodes as functions that are written in ONNX operators.
"""

from __future__ import annotations

import onnx
import torch
from torch import Tensor

from stg_trt.engines.tensorrt_library import PLUGIN_NAMESPACE, PLUGIN_VERSION

# RMS norm of groups of channels, then (a, b) -> (a*cos - b*sin, b*cos + a*sin) of pairs, in float32.
_NORM_ROPE = """
<domain: "stg_trt", opset_import: ["" : 23]>
NormRope <group, eps> (x, weight, cos, sin) => (y) {
    tokens = Constant <value_ints: ints = [0, 0, -1]> ()
    group_size = Constant <value_int: int = @group> ()
    one = Constant <value_ints: ints = [1]> ()
    group_axis = Reshape (group_size, one)
    by_group = Concat <axis: int = 0> (tokens, group_axis)
    wide = Cast <to: int = 1> (x)
    groups = Reshape (wide, by_group)
    normed = RMSNormalization <axis: int = -1, epsilon: float = @eps> (groups, weight)
    pairs_axis = Shape <start: int = 1, end: int = 2> (cos)
    two = Constant <value_ints: ints = [2]> ()
    by_pair = Concat <axis: int = 0> (tokens, pairs_axis, two)
    pairs = Reshape (normed, by_pair)
    a, b = Split <axis: int = -1, num_outputs: int = 2> (pairs)
    around = Constant <value_ints: ints = [1, 3]> ()
    pair_cos = Unsqueeze (cos, around)
    pair_sin = Unsqueeze (sin, around)
    a_cos = Mul (a, pair_cos)
    b_sin = Mul (b, pair_sin)
    b_cos = Mul (b, pair_cos)
    a_sin = Mul (a, pair_sin)
    first = Sub (a_cos, b_sin)
    second = Add (b_cos, a_sin)
    rotated = Concat <axis: int = -1> (first, second)
    shape = Shape (x)
    joined = Reshape (rotated, shape)
    y = CastLike (joined, x)
}
"""
_QK_NORM_ROPE = """
<domain: "stg_trt", opset_import: ["" : 23, "stg_trt" : 1]>
QKNormRope <group, eps, plugin_namespace, plugin_version>
(q, k, q_weight, k_weight, cos, sin) => (q_out, k_out) {
    q_out = stg_trt.NormRope <group: int = @group, eps: float = @eps> (q, q_weight, cos, sin)
    k_out = stg_trt.NormRope <group: int = @group, eps: float = @eps> (k, k_weight, cos, sin)
}
"""


def qk_norm_rope(
    query: Tensor, key: Tensor, weights: tuple[Tensor, Tensor], rope: tuple[Tensor, Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """The node of plugins/qk_norm_rope while a graph is exported; outside of that it computes nothing."""
    out = torch.onnx.ops.symbolic_multi_out(
        f"{PLUGIN_NAMESPACE}::QKNormRope",
        (query, key, *weights, *rope),
        {
            "group": len(weights[0]),
            "eps": eps,
            "plugin_namespace": PLUGIN_NAMESPACE,
            "plugin_version": PLUGIN_VERSION,
        },
        dtypes=(query.dtype, key.dtype),
        shapes=(query.shape, key.shape),
        version=1,
    )
    return out[0], out[1]


def define(model: onnx.ModelProto) -> None:
    """Adds the nodes' functions to a graph that has such nodes, for ONNX Runtime."""
    if any(node.domain == PLUGIN_NAMESPACE for node in model.graph.node):
        model.functions.extend(map(onnx.parser.parse_function, (_NORM_ROPE, _QK_NORM_ROPE)))
