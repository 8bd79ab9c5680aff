"""A piece of a segment to an ONNX graph with free rows, whose weights are inputs."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from stg_trt.errors import GateMissed
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.tensor_spec import TensorSpec

from .dynamic_rows import traced_with
from .weights import weights_of


@dataclass(frozen=True, eq=False)
class PieceGraph:
    """The graph of every piece with the same key: its inputs are those of the module, then its weights."""

    graph: ir.Graph
    ir_version: int


class _WeightsAsInputs(nn.Module):
    """Called with the inputs and then the weights, so that the graph is that of any piece of the kind."""

    def __init__(self, module: SegmentModule) -> None:
        super().__init__()
        # In a list, so that its weights are not registered.
        self._module = [module]
        self._names = [name for name, _ in weights_of(module)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        (module,) = self._module
        inputs, weights = tensors[: len(module.inputs)], tensors[len(module.inputs) :]
        named = dict(zip(self._names, weights, strict=True))
        outputs: tuple[Tensor, ...] = torch.func.functional_call(module, named, inputs)
        return outputs


def export(
    segment: str, module: SegmentModule, inputs: Sequence[TensorSpec], *, opset: int, max_rows: int
) -> PieceGraph:
    """The graph of a piece of a segment; raises GateMissed if its number of rows froze."""
    args, axes = traced_with(inputs, max_rows)
    weights = [tensor for _, tensor in weights_of(module)]
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            _WeightsAsInputs(module).eval(),
            (*args, *weights),
            dynamo=True,
            input_names=[*module.inputs, *map(weight_name, range(len(weights)))],
            dynamic_shapes=((*axes, *(None for _ in weights)),),
            opset_version=opset,
            verbose=False,
        )
    assert program is not None and not program.model.functions
    _check_borders(segment, program.model.graph, inputs)
    _share_norm_scales(program.model.graph)
    # Where each operator was called: it would differ from machine to machine.
    ClearMetadataAndDocStringPass()(program.model)
    return PieceGraph(program.model.graph, program.model.ir_version)


def weight_name(place: int) -> str:
    """The input of a piece's graph that is the weight at this place of `weights_of`."""
    return f"weight_{place}"


def _share_norm_scales(graph: ir.Graph) -> None:
    """Of norms without a weight: the exporter makes ones of the size of all hidden states, for every run."""
    for node in graph:
        scale = node.inputs[1] if node.op_type == "RMSNormalization" else None
        maker = scale.producer() if scale is not None else None
        if maker is not None and maker.op_type == "ConstantOfShape":
            (x, *_), name = node.inputs, f"{node.name}_scale"
            assert x is not None and x.shape is not None
            ones = ir.tensor(torch.ones(int(x.shape[-1])).numpy(), name=name)  # type: ignore[arg-type]
            shared = ir.val(name, const_value=ones)
            graph.register_initializer(shared)
            node.replace_input_with(1, shared)


def _check_borders(segment: str, graph: ir.Graph, inputs: Sequence[TensorSpec]) -> None:
    """Every input is there, in its shape, with its rows still dynamic."""
    for spec, value in zip(inputs, graph.inputs, strict=False):
        assert value.name == spec.name and value.shape is not None
        shape = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
        frozen = [
            isinstance(dim, int) if isinstance(wanted, str) else dim != wanted
            for dim, wanted in zip(shape, spec.shape, strict=True)
        ]
        if any(frozen):
            raise GateMissed(
                f"{segment}: expected {spec.name} of shape {spec.shape}, got {shape}: an operation in the "
                "segment fixes the number of rows"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and warns about its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
