"""Whether two ONNX graphs compute the same, node by node, whatever the names in them."""

from __future__ import annotations

import onnx_ir as ir

Pair = tuple[ir.Value | None, ir.Value | None]


def first_difference(one: ir.Graph, other: ir.Graph) -> str | None:
    """Where the graphs, followed from their outputs, first compute something else; None if nowhere.

    A copy is what it copies, and a reshape of a reshape reads what that one does. What one graph computes
    once for several readers, the other may compute for each.
    """
    waiting: list[Pair] = [*zip(one.outputs, other.outputs, strict=True)]
    seen: set[Pair] = set()
    while waiting:
        first, second = waiting.pop()
        pair = _behind(first, "Identity"), _behind(second, "Identity")
        if pair in seen:
            continue
        seen.add(pair)
        if _made_by(pair[0]) != _made_by(pair[1]):
            return f"{_shown(pair[0])} and {_shown(pair[1])}"
        waiting += zip(_read_by(pair[0]), _read_by(pair[1]), strict=True)
    return None


def _behind(value: ir.Value | None, op_type: str) -> ir.Value | None:
    """What nodes of this type in a row read first, if such a node makes the value."""
    while value is not None and (node := value.producer()) is not None and node.op_type == op_type:
        value = node.inputs[0]
    return value


def _made_by(value: ir.Value | None) -> object:
    """The operator with its attributes, an input's name, or a constant's values."""
    if value is None:
        return None
    node = value.producer()
    if node is not None:
        attributes = {name: _attribute(attribute) for name, attribute in node.attributes.items()}
        return node.op_identifier(), attributes, value.index(), len(node.inputs)
    return value.name if value.const_value is None else _constant(value.const_value)


def _read_by(value: ir.Value | None) -> list[ir.Value | None]:
    node = None if value is None else value.producer()
    if node is None:
        return []
    first, *others = node.inputs or (None,)
    return [_behind(first, "Reshape") if node.op_type == "Reshape" else first, *others]


def _attribute(value: ir.Attr) -> object:
    return _constant(value.as_tensor()) if value.type == ir.AttributeType.TENSOR else value.value


def _constant(tensor: ir.TensorProtocol) -> object:
    return tensor.dtype, [int(size) for size in tensor.shape.numpy()], tensor.tobytes()


def _shown(value: ir.Value | None) -> str:
    return str(value if value is None or value.producer() is None else value.producer())
