"""Linears that read the same tensor as one product of their weights one below the other.

Queries, keys and values are; so are the keys and values of a text. The tensor is read once, and one large
product leaves fewer multiprocessors idle at its end than several small ones. For inductor alone:

- TensorRT joins them by itself. The plan that TensorRT-RTX 1.7.1 makes of a block of width 2048 has one
  weight of 2048 x 6144 for its queries, keys and values, and one of 2048 x 4096 for those of the text.
- ONNX Runtime copies the parts of a result that is split. On one or two cores, by turns, two rows of 1024
  tokens of width 2048 take 2 to 6 % longer joined, and of width 512 8 %.
- inductor reads the parts where they are. On one core, in float32, that block with 1024 tokens and one of
  width 128 take as long as with their products apart (0.97 to 1.01 times). What a GPU gains is not measured yet.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import Argument

from .gelu_epilogue import gelu_follows
from .node_values import set_values

aten = torch.ops.aten


def join_products(program: ExportedProgram) -> dict[str, tuple[str, ...]]:
    """Joins the linears of one input, in place; by name the weights that are others one below the other.

    A joined weight has the name of its first part; the program knows the other parts no more.
    """
    joined: dict[str, tuple[str, ...]] = {}
    for groups in _groups_of_linears(program):
        joined |= _join(program, groups)
    program.graph_module.recompile()
    return joined


Group = list[Node]
"""Two or more linears of one input, all with or all without a bias, in the order of the program."""


def _groups_of_linears(program: ExportedProgram) -> list[list[Group]]:
    """Those that can be joined; groups with the same weights, such as two streams have, stand together."""
    by_input: dict[object, Group] = {}
    for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        if not gelu_follows(node):
            by_input.setdefault((node.args[0], len(node.args)), []).append(node)
    by_weights: dict[tuple[Node, ...], list[Group]] = {}
    for linears in by_input.values():
        by_weights.setdefault(_weights(linears), []).append(linears)
    parameters = program.graph_signature.inputs_to_parameters
    return [
        groups
        for weights, groups in by_weights.items()
        if len(groups[0]) > 1
        and all(weight.name in parameters and len(weight.users) == len(groups) for weight in weights)
    ]


def _weights(linears: Group) -> tuple[Node, ...]:
    return tuple(weight for linear in linears for weight in linear.args[1:] if isinstance(weight, Node))


def _join(program: ExportedProgram, groups: list[Group]) -> dict[str, tuple[str, ...]]:
    """One linear for each group; see `join_products`."""
    # The weights of all linears, and the biases of all where they have one.
    parts = [*zip(*(linear.args[1:] for linear in groups[0]), strict=True)]
    joined = dict(_stack(program, placeholders) for placeholders in parts)  # type: ignore[arg-type]
    for linears in groups:
        _join_group(linears, [first for first, *_ in parts])
    for _, *others in parts:
        for placeholder in others:
            program.graph.erase_node(placeholder)  # type: ignore[arg-type]
    return joined


def _join_group(linears: Group, weights: Sequence[Argument]) -> None:
    """One linear with the joined weights, and a view of its result for each that it replaces."""
    graph, x = linears[0].graph, linears[0].args[0]
    sizes = [linear.meta["val"].shape[-1] for linear in linears]
    with graph.inserting_before(linears[0]):
        product = graph.call_function(aten.linear.default, (x, *weights))
        split = graph.call_function(aten.split_with_sizes.default, (product, sizes, -1))
        views = [graph.call_function(operator.getitem, (split, place)) for place in range(len(linears))]
    set_values((product, split, *views))
    for linear, view in zip(linears, views, strict=True):
        linear.replace_all_uses_with(view)
        graph.erase_node(linear)


def _stack(program: ExportedProgram, placeholders: Sequence[Node]) -> tuple[str, tuple[str, ...]]:
    """Makes the first parameter all of them one below the other; its name, and theirs."""
    signature, weights = program.graph_signature, program.state_dict
    names = tuple(signature.inputs_to_parameters[placeholder.name] for placeholder in placeholders)
    placeholders[0].meta["val"] = torch.cat([placeholder.meta["val"] for placeholder in placeholders])
    stacked = torch.cat([weights.pop(name) for name in names])
    weights[names[0]] = nn.Parameter(stacked, requires_grad=False)
    signature.input_specs[:] = [spec for spec in signature.input_specs if spec.target not in names[1:]]
    return names[0], names
