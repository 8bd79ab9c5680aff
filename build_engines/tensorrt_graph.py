"""A graph with other nodes where TensorRT runs them better."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from .graph_constants import constant

# A choice per entry: many of them would cost more than the lookup.
MOST_ENTRIES = 8


def choose_entries(graph: ir.Graph) -> int:
    """Replaces lookups in tables of a few entries by choices among these; how many there were.

    TensorRT fuses choices with what reads them. A lookup is a tensor of its own, and TensorRT-RTX 1.7 makes
    those of all blocks first: 5.2 GiB for 19 blocks of width 2048, where choices take 0.8.
    """
    found = [(node, entries) for node in graph if (entries := _entries(node))]
    for node, entries in found:
        _choose(graph, node, entries)
    return len(found)


def _entries(node: ir.Node) -> int:
    """How many entries (rows, entries, channels) has, if the node looks them up for each token; else 0."""
    if node.op_type != "Gather" or node.attributes["axis"].as_int() != 1:
        return 0
    table, index = (value.shape if value is not None else None for value in node.inputs)
    if table is None or index is None or (len(table), len(index)) != (3, 1):
        return 0
    return table[1] if isinstance(table[1], int) and 2 <= table[1] <= MOST_ENTRIES else 0


def _choose(graph: ir.Graph, lookup: ir.Node, entries: int) -> None:
    table, index = lookup.inputs
    looked_up = lookup.outputs[0]
    tape = Tape()
    split = {"axis": 1, "num_outputs": entries}
    chosen, *others = tape.op_multi_out("Split", [table], split, num_outputs=entries)
    place = tape.op("Unsqueeze", [index, constant(graph, "choice/last", np.array([1]))])
    for number, entry in enumerate(others, start=1):
        is_its = tape.op("Equal", [place, constant(graph, f"choice/{number}", np.array(number))])
        chosen = tape.op("Where", [is_its, entry, chosen])
    for number, node in enumerate(tape.nodes):
        node.name = f"{lookup.name}/choice_{number}"
    graph.insert_before(lookup, tape.nodes)
    chosen.shape, chosen.type = looked_up.shape, looked_up.type
    ir.convenience.replace_all_uses_with(looked_up, chosen)
