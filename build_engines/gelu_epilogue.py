"""GELU as the end of the matrix product before it: on a GPU it costs no pass over memory of its own."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from .node_values import set_values

aten = torch.ops.aten


def fold_gelu(program: ExportedProgram) -> int:
    """Replaces every linear with a bias and the tanh GELU of it, in place; how many there were.

    The operator computes the tanh GELU on CUDA, through cuBLASLt's epilogue; on a CPU it is the erf GELU.
    """
    graph_module = program.graph_module
    linears = graph_module.graph.find_nodes(op="call_function", target=aten.linear.default)
    found = [next(iter(node.users)) for node in linears if gelu_follows(node)]
    for gelu in found:
        _fold(graph_module, gelu)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return len(found)


def gelu_follows(linear: Node) -> bool:
    """Whether the tanh GELU alone reads the result of a linear with a bias."""
    (gelu, *others) = linear.users or (linear,)
    tanh_gelu = gelu.target == aten.gelu.default and gelu.kwargs.get("approximate") == "tanh"
    # Its arguments are x, weight and, if it has one, bias.
    return tanh_gelu and not others and len(linear.args) == 3


def _fold(graph_module: GraphModule, gelu: Node) -> None:
    """Over all tokens as rows of one matrix, which is what the operator takes."""
    graph = graph_module.graph
    (linear,) = gelu.all_input_nodes
    x, weight, bias = linear.args
    assert isinstance(x, Node) and isinstance(weight, Node)
    *_, tokens, channels = x.meta["val"].shape
    with graph.inserting_before(gelu):
        rows = graph.call_function(aten.reshape.default, (x, [-1, channels]))
        turned = graph.call_function(aten.t.default, (weight,))
        given = bias, rows, turned
        product = graph.call_function(aten._addmm_activation.default, given, {"use_gelu": True})
        width = weight.meta["val"].shape[0]
        folded = graph.call_function(aten.reshape.default, (product, [-1, tokens, width]))
    set_values((rows, turned, product, folded))
    gelu.replace_all_uses_with(folded)
