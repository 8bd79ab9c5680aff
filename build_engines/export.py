"""A segment to ONNX, with one dynamic dimension: the rows."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import torch

from stg_trt.errors import GateMissed
from stg_trt.models.families.base import SegmentModule
from stg_trt.models.segment import engine_outputs
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.system.units import GIB

from .dynamic_rows import traced_with

# protobuf refuses messages of 2 GiB; weights above this go to a file beside the graph.
_EMBEDDED_BYTES = GIB


def export(
    module: SegmentModule, inputs: Sequence[TensorSpec], path: Path, *, opset: int, max_rows: int
) -> None:
    """Writes `path`, and `path`.data where the weights are large; raises GateMissed if an axis froze."""
    args, axes = traced_with(inputs, max_rows)
    weight_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            args,
            dynamo=True,
            input_names=list(module.inputs),
            output_names=list(engine_outputs(module.inputs, module.outputs)),
            dynamic_shapes=(axes,),
            opset_version=opset,
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=weight_bytes > _EMBEDDED_BYTES)
    _check_borders(path, inputs)


def files_of(path: Path) -> list[Path]:
    """The graph and, where there is one, its weights file."""
    data = path.with_name(path.name + ".data")
    return [path, data] if data.exists() else [path]


def _check_borders(path: Path, inputs: Sequence[TensorSpec]) -> None:
    """Every input is there, in its shape, with its rows still dynamic."""
    graph = onnx.load(path, load_external_data=False).graph
    found = {
        node.name: [dim.dim_param or dim.dim_value for dim in node.type.tensor_type.shape.dim]
        for node in graph.input
    }
    for spec in inputs:
        shape = found.get(spec.name)
        if shape is None:
            raise GateMissed(f"{path.stem}: expected an input {spec.name}, got none: the segment ignores it")
        frozen = [
            isinstance(dim, int) if wanted == ROWS else dim != wanted
            for dim, wanted in zip(shape, spec.shape, strict=True)
        ]
        if any(frozen):
            raise GateMissed(
                f"{path.stem}: expected {spec.name} of shape {spec.shape}, got {shape}: an operation in the "
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
