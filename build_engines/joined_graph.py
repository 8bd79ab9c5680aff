"""The ONNX graph of a segment, joined from the graphs of its pieces: each kind of piece is exported once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir import tensor_adapters
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import engine_outputs
from stg_trt.models.tensor_spec import TensorSpec

from .export import PieceGraph
from .graph_weights import GraphWeights
from .weights import weights_of


class JoinedGraph:
    """Grows piece by piece; every tensor that pieces pass on is a value under the tensor's name.

    It is written to `path`. Large weights go to `path`.data with every piece, so that no more than a piece
    is in memory.
    """

    def __init__(self, inputs: Sequence[TensorSpec], path: Path) -> None:
        self._path = path
        self._weights = GraphWeights(_data_of(path))
        self._inputs = [_input(spec) for spec in inputs]
        self._values = {str(value.name): value for value in self._inputs}
        self._graph = ir.Graph(self._inputs, [], nodes=[], name="segment", opset_imports={})
        self._pieces = self._ir_version = 0
        self._of_checkpoint: set[str] = set()

    def append(self, name: str, piece: PieceGraph, module: SegmentModule) -> None:
        """Adds a piece, with the weights of its module; its values and nodes are named after it."""
        name, self._pieces = f"{self._pieces}_{name}", self._pieces + 1
        self._ir_version = piece.ir_version
        copy = piece.graph.clone()
        for value in _own_values(copy):
            value.name = f"{name}/{value.name}"
        given = dict(zip(copy.inputs, map(self._values.__getitem__, module.inputs), strict=False))
        weights = zip(copy.inputs[len(module.inputs) :], weights_of(module), strict=True)
        for placeholder, (weight, tensor) in weights:
            if placeholder.uses():
                given[placeholder] = self._initializer(
                    tensor_adapters.TorchTensor(tensor, f"{name}/{weight}")
                )
                self._of_checkpoint.add(f"{name}/{weight}")
        for constant in [*copy.initializers.values()]:
            assert constant.const_value is not None
            given[constant] = self._initializer(constant.const_value, constant.name)
        outputs = [given.get(value, value) for value in copy.outputs]
        copy.outputs.clear()
        for placeholder, value in given.items():
            ir.convenience.replace_all_uses_with(placeholder, value)
        nodes = [*copy]
        copy.remove(nodes)
        for node in nodes:
            node.name = f"{name}/{node.name}"
        self._graph.extend(nodes)
        self._graph.opset_imports.update(copy.opset_imports)
        self._values |= dict(zip(module.outputs, outputs, strict=True))

    def save(
        self, outputs: tuple[str, ...], rewrite: Callable[[ir.Graph], object] = lambda graph: None
    ) -> None:
        """Writes the graph; `rewrite` changes it before."""
        engine_names = engine_outputs(tuple(str(value.name) for value in self._inputs), outputs)
        for name, engine_name in zip(outputs, engine_names, strict=True):
            self._graph.outputs.append(self._output(self._values[name], engine_name))
        _skip_reshapes_back(self._graph)
        rewrite(self._graph)
        model = ir.Model(self._graph, ir_version=self._ir_version, producer_name="stg_trt")
        CommonSubexpressionEliminationPass()(model)
        RemoveUnusedNodesPass()(model)
        ir.save(model, self._path)

    @property
    def weights(self) -> frozenset[str]:
        """The names of the checkpoint's weights in the graph, which has other constants too."""
        return frozenset(self._of_checkpoint & self._graph.initializers.keys())

    def _initializer(self, tensor: ir.TensorProtocol, name: str | None = None) -> ir.Value:
        value = ir.val(name or tensor.name, const_value=tensor)
        self._graph.register_initializer(value)
        self._weights.add(value)
        return value

    def _output(self, value: ir.Value, name: str) -> ir.Value:
        """The value under a name; a copy where it has another name already."""
        if value.is_graph_input() or value.is_graph_output():
            node = ir.Node("", "Identity", [value], name=f"copy_to_{name}")
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            self._graph.append(node)
            (value,) = node.outputs
        value.name = name
        return value


def files_of(path: Path) -> list[Path]:
    """The graph and, where there is one, its weights file."""
    data = _data_of(path)
    return [path, data] if data.exists() else [path]


def _data_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _input(spec: TensorSpec) -> ir.Value:
    dtype = ir.TensorType(tensor_adapters.from_torch_dtype(spec.torch_dtype))
    return ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=dtype)


def _own_values(graph: ir.Graph) -> list[ir.Value]:
    """What nodes make, and constants; not the inputs."""
    return [*(output for node in graph for output in node.outputs), *graph.initializers.values()]


def _skip_reshapes_back(graph: ir.Graph) -> None:
    """Where pieces meet, tokens become a grid and tokens again: what follows reads them as they were."""
    for node in graph:
        before = node.inputs[0] if node.op_type == "Reshape" else None
        producer = before.producer() if before is not None else None
        if producer is None or producer.op_type != "Reshape":
            continue
        source, result = producer.inputs[0], node.outputs[0]
        if source is not None and source.shape == result.shape and not result.is_graph_output():
            ir.convenience.replace_all_uses_with(result, source)
