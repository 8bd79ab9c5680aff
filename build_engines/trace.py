"""A module to a torch.export program with free rows, numbered weights, and outputs that it is given."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from stg_trt.errors import GateMissed
from stg_trt.models.families.base import SegmentModule
from stg_trt.models.tensor_spec import TensorSpec

from .dynamic_rows import traced_with


class _Numbered(nn.Module):
    """Weights under numbers instead of names, so that blocks which differ in weights alone trace equally.

    Called with the inputs and then the outputs, which it overwrites.
    """

    def __init__(self, module: SegmentModule) -> None:
        super().__init__()
        # In a list, so that its weights are not registered a second time under their own names.
        self._module = [module]
        self._names = []
        for number, (name, tensor) in enumerate((*module.named_parameters(), *module.named_buffers())):
            self._names.append(name)
            weight = nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
            self.register_parameter(f"w{number}", weight)

    def forward(self, *tensors: Tensor) -> tuple[()]:
        (module,) = self._module
        inputs, outputs = tensors[: len(module.inputs)], tensors[len(module.inputs) :]
        weights = {name: getattr(self, f"w{number}") for number, name in enumerate(self._names)}
        for output, result in zip(outputs, torch.func.functional_call(module, weights, inputs), strict=True):
            output.copy_(result)
        return ()


def trace(
    name: str,
    module: SegmentModule,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    max_rows: int,
) -> ExportedProgram:
    """The program of a piece of the segment `name`; raises GateMissed where its rows are not free."""
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
    return program


def weights_of(program: ExportedProgram) -> dict[str, Tensor]:
    """The weights that the program reads, by the names that a package knows them under."""
    used = {node.name for node in program.graph.find_nodes(op="placeholder") if node.users}
    return {
        weight: program.state_dict[weight].detach()
        for placeholder, weight in program.graph_signature.inputs_to_parameters.items()
        if placeholder in used
    }


def fingerprint(program: ExportedProgram) -> str:
    """SHA-256 of all that decides what a program computes, but for the values of its weights."""
    shapes = [
        (node.name, str(node.meta["val"].dtype), str(node.meta["val"].shape), str(node.meta["val"].stride()))
        for node in program.graph.find_nodes(op="placeholder")
    ]
    text = f"{program.graph_module.code}{shapes}{program.range_constraints}"
    return hashlib.sha256(text.encode()).hexdigest()
