"""What a module is traced with, so that its number of rows stays free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from stg_trt.models.tensor_spec import ROWS, TensorSpec

_TRACED_ROWS = 2


def traced_with(specs: Sequence[TensorSpec], max_rows: int) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Random arguments of these specs, and the dynamic axes of each: its rows, from 1 to `max_rows`."""
    # With no number of rows above the traced one, torch.export does not notice that an axis froze.
    rows = Dim(ROWS, min=1, max=max(max_rows, _TRACED_ROWS + 1))
    generator = torch.Generator().manual_seed(0)
    arguments = tuple(spec.random(_TRACED_ROWS, generator) for spec in specs)
    axes = tuple({spec.shape.index(ROWS): rows} if spec.has_rows else None for spec in specs)
    return arguments, axes
