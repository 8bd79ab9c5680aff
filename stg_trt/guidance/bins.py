"""Values that depend on the step: one for all, one per step, or a table over the noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import torch

from stg_trt.errors import InvalidRequest

T = TypeVar("T")
Blocks = tuple[int, ...]


@dataclass(frozen=True)
class TimestepBins(Generic[T]):
    """A table over sigma in 0..1: a step takes the first bin whose edge is <= the step's, else the last.

    Compared in float32, as timesteps are. Source: `guidance_timesteps` in Lightricks' own pipeline.
    """

    edges: tuple[float, ...]
    values: tuple[T, ...]

    def __post_init__(self) -> None:
        if not self.edges or len(self.edges) != len(self.values):
            raise InvalidRequest(
                f"bins: expected one value per edge, got {len(self.values)} for {len(self.edges)} edges: "
                "add or drop some"
            )
        if not all(0 <= edge <= 1 for edge in self.edges):
            raise InvalidRequest(
                f"bins: expected edges in 0..1, got {self.edges}: divide timesteps by the training steps"
            )
        if any(left <= right for left, right in pairwise(self.edges)):
            raise InvalidRequest(f"bins: expected falling edges, got {self.edges}: sort them from 1 to 0")

    def at(self, sigma: float) -> T:
        """The value for one step's sigma."""
        edges = torch.tensor(self.edges, dtype=torch.float32)
        reached = (edges <= torch.tensor(sigma, dtype=torch.float32)).nonzero()
        return self.values[int(reached[0]) if len(reached) else -1]


Scale = float | Sequence[float] | TimestepBins[float]
BlockSets = int | Sequence[int] | Sequence[Sequence[int]] | TimestepBins[Blocks]
SkipScales = Scale | Mapping[str, Scale]
SkipBlocks = BlockSets | Mapping[str, BlockSets]
"""Of several skip passes, by their names; else of one, or of all alike."""
