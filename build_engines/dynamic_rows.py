"""What a module is traced with, so that its number of rows stays free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from stg_trt.models.tensor_spec import TensorSpec

_TRACED_ROWS = 2


def traced_with(specs: Sequence[TensorSpec], max_rows: int) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Random arguments of these specs, and the dynamic axes of each: its rows, from 1 to `max_rows`."""
    # With no number of rows above the traced one, torch.export does not notice that an axis froze.
    most = max(max_rows, _TRACED_ROWS + 1)
    generator = torch.Generator().manual_seed(0)
    arguments = tuple(spec.random(_TRACED_ROWS, generator) for spec in specs)
    names = {dim for spec in specs for dim in spec.shape if isinstance(dim, str)}
    dims = {name: Dim(name, min=1, max=most) for name in sorted(names)}
    axes = tuple(None if spec.row_axis is None else {spec.row_axis: _dim(dims, spec)} for spec in specs)
    return arguments, axes


def _dim(dims: Mapping[str, Any], spec: TensorSpec) -> Any:
    assert spec.row_axis is not None
    return dims[str(spec.shape[spec.row_axis])]
