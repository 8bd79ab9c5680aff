"""Name, dtype and symbolic shape of one tensor at a segment's border."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

ROWS = "rows"
"""The symbolic dimension: guidance states times videos; a kept tensor has rows of its own, see `kept`."""

Dim = int | str
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "bool": torch.bool,
    "int64": torch.int64,
}
_INDEX_PREFIX = "row_of_"


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
    def row_axis(self) -> int | None:
        """Where its rows are counted; None if all rows share the tensor."""
        return next((axis for axis, dim in enumerate(self.shape) if isinstance(dim, str)), None)

    @property
    def has_rows(self) -> bool:
        """Whether the tensor has one entry per row; the others are shared by all rows, or kept."""
        return ROWS in self.shape

    @property
    def kept(self) -> TensorSpec:
        """The same with the rows of the passes that made it; another input says which to read."""
        dims = (f"{ROWS}_of_{self.name}" if dim == ROWS else dim for dim in self.shape)
        return replace(self, shape=tuple(dims))

    def with_rows(self, rows: int) -> tuple[int, ...]:
        """The concrete shape for a number of rows."""
        return tuple(rows if isinstance(dim, str) else dim for dim in self.shape)

    def profile(self, rows: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The shapes of a profile of (min, opt, max) rows; the rows of a kept tensor may be fewer."""
        least, *others = rows
        return tuple(map(self.with_rows, (least if self.has_rows else 1, *others)))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor's shape is this one, for some number of rows."""
        return len(shape) == len(self.shape) and all(
            isinstance(wanted, str) or wanted == got for wanted, got in zip(self.shape, shape, strict=True)
        )

    def random(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """Standard normal values (true for bool, the first row for an index), for tracing."""
        if self.dtype == "bool":
            return torch.ones(self.with_rows(rows), dtype=torch.bool)
        if self.dtype == "int64":
            return torch.zeros(self.with_rows(rows), dtype=torch.int64)
        return torch.randn(self.with_rows(rows), generator=generator).to(self.torch_dtype)

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


def index_of(name: str) -> str:
    """The input that says, for each row, which row of a kept tensor it reads."""
    return f"{_INDEX_PREFIX}{name}"


def index_spec(name: str) -> TensorSpec:
    """Of the index into a kept tensor's rows."""
    return TensorSpec(index_of(name), "int64", (ROWS,))


def kept_name(index: str) -> str | None:
    """The kept tensor that an input is the index of; None for other inputs."""
    return index.removeprefix(_INDEX_PREFIX) if index.startswith(_INDEX_PREFIX) else None
