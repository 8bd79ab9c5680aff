"""Everything that decides how TensorRT compiles one graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stg_trt.models.tensor_spec import TensorSpec

from .compiler import Rows


@dataclass(frozen=True)
class Recipe:
    """A graph, for which rows and which GPU, and the builder's options; the engine is written beside it.

    `refittable` are the weights whose values can be replaced in the finished engine.
    """

    graph: Path
    inputs: tuple[TensorSpec, ...]
    profiles: tuple[Rows, ...]
    backend: str
    target: str
    builder_optimization_level: int | None = None
    timing_cache: Path | None = None
    plugins: bool = False
    refittable: tuple[str, ...] = ()

    @property
    def segment(self) -> str:
        """The segment that the graph is of."""
        return self.graph.stem

    @property
    def engine(self) -> Path:
        """The finished file."""
        return self.graph.with_suffix(f".{self.target}.engine")

    @property
    def layers(self) -> Path:
        """The engine inspector's report on it."""
        return self.engine.with_suffix(".layers.json")
