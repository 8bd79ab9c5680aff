"""A module to a torch.export program with free rows, numbered weights, and outputs that it is given."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from stg_trt.errors import GateMissed
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.tensor_spec import TensorSpec

from .dynamic_rows import traced_with
from .joined_products import join_products
from .weights import weights_of


class _Numbered(nn.Module):
    """Weights under numbers instead of names, so that blocks which differ in weights alone trace equally.

    Called with the inputs and then the outputs, which it overwrites.
    """

    def __init__(self, module: SegmentModule) -> None:
        super().__init__()
        # In a list, so that its weights are not registered a second time under their own names.
        self._module = [module]
        self._names = []
        for number, (name, tensor) in enumerate(weights_of(module)):
            self._names.append(name)
            self.register_parameter(_number(number), nn.Parameter(tensor, requires_grad=False))

    def forward(self, *tensors: Tensor) -> tuple[()]:
        (module,) = self._module
        inputs, outputs = tensors[: len(module.inputs)], tensors[len(module.inputs) :]
        weights = {name: getattr(self, _number(number)) for number, name in enumerate(self._names)}
        for output, result in zip(outputs, torch.func.functional_call(module, weights, inputs), strict=True):
            output.copy_(result)
        return ()


@dataclass(frozen=True)
class Trace:
    """A program, its fingerprint, the numbers of the weights that it reads, and which are joined of others.

    The program is that of every piece with the same key; the weights in it are those of the first.
    """

    program: ExportedProgram
    fingerprint: str
    reads: frozenset[str]
    joined: Mapping[str, tuple[str, ...]]

    def weights_of(self, module: SegmentModule) -> dict[str, Tensor]:
        """What the program reads of a piece, by the names that a package knows its weights under."""
        numbered = {_number(number): tensor for number, (_, tensor) in enumerate(weights_of(module))}
        joined = {name: torch.cat([numbered[part] for part in parts]) for name, parts in self.joined.items()}
        return {name: tensor for name, tensor in (numbered | joined).items() if name in self.reads}


def trace(
    name: str,
    module: SegmentModule,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    max_rows: int,
) -> Trace:
    """What a piece of the segment `name` computes; raises GateMissed where its rows are not free."""
    arguments, axes = traced_with((*inputs, *outputs), max_rows)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(_Numbered(module), arguments, dynamic_shapes=(axes,), strict=False)
    except (torch._dynamo.exc.UserError, ValueError) as error:
        raise GateMissed(
            f"{name}: expected any number of rows from 1 to {max_rows}, got an operation in the segment that "
            f"fixes it: {' '.join(str(error).split())[:200]}"
        ) from error
    if program.constants:
        raise GateMissed(
            f"{name}: expected all weights to be parameters or buffers, got {len(program.constants)} tensors "
            "made while it runs: register them as buffers"
        )
    joined = join_products(program)
    return Trace(program, _fingerprint(program), _weights_read(program), joined)


def _weights_read(program: ExportedProgram) -> frozenset[str]:
    """The numbers of the weights that it does not leave unused."""
    used = {node.name for node in program.graph.find_nodes(op="placeholder") if node.users}
    weights = program.graph_signature.inputs_to_parameters
    return frozenset(weight for placeholder, weight in weights.items() if placeholder in used)


def _fingerprint(program: ExportedProgram) -> str:
    """SHA-256 of all that decides what a program computes, but for the values of its weights."""
    shapes = [
        (node.name, str(node.meta["val"].dtype), str(node.meta["val"].shape), str(node.meta["val"].stride()))
        for node in program.graph.find_nodes(op="placeholder")
    ]
    text = f"{program.graph_module.code}{shapes}{program.range_constraints}"
    return hashlib.sha256(text.encode()).hexdigest()


def _number(place: int) -> str:
    return f"w{place}"
