"""Name, dtype and symbolic shape of one tensor at a segment's border."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

ROWS = "rows"
"""The one symbolic dimension: guidance states times videos."""

Dim = int | str
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "bool": torch.bool}


@dataclass(frozen=True)
class TensorSpec:
    """ONNX axes, TensorRT profile, static buffers and the engine key all come from this."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return _DTYPES[self.dtype]

    @property
    def has_rows(self) -> bool:
        """Whether the tensor has one entry per row; the others are shared by all rows."""
        return ROWS in self.shape

    def with_rows(self, rows: int) -> tuple[int, ...]:
        """The concrete shape for a number of rows."""
        return tuple(rows if isinstance(dim, str) else dim for dim in self.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor's shape is this one, for some number of rows."""
        return len(shape) == len(self.shape) and all(
            isinstance(wanted, str) or wanted == got for wanted, got in zip(self.shape, shape, strict=True)
        )

    def random(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """Standard normal values (all true for bool), for tracing."""
        if self.dtype == "bool":
            return torch.ones(self.with_rows(rows), dtype=torch.bool)
        return torch.randn(self.with_rows(rows), generator=generator).to(self.torch_dtype)

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}
