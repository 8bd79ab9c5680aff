"""Published guidance tables, shipped as JSON, and the bins they are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
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


BlockSets = Sequence[int] | Sequence[Sequence[int]] | TimestepBins[Blocks]


@dataclass(frozen=True)
class Preset:
    """Published guidance tables with the steps they belong to; see `load_preset`."""

    num_inference_steps: int
    drop_first: int
    drop_last: int
    stg_mode: str
    cfg_zero_star: bool
    guidance_scale: Scale
    stg_scale: Scale
    rescale: Scale
    stg_blocks: BlockSets


def load_preset(name: str) -> Preset:
    """A preset shipped in `stg_trt/presets`, by file name without `.json`."""
    folder = resources.files("stg_trt") / "presets"
    known = sorted(
        entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")
    )
    if name not in known:
        raise InvalidRequest(f"preset: expected one of {', '.join(known)}, got {name!r}: correct the name")
    data = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    edges = tuple(data["edges"])

    def bins(key: str) -> TimestepBins[float]:
        return TimestepBins(edges, tuple(float(value) for value in data[key]))

    return Preset(
        num_inference_steps=data["num_inference_steps"],
        drop_first=data["drop_first"],
        drop_last=data["drop_last"],
        stg_mode=data["stg_mode"],
        cfg_zero_star=data["cfg_zero_star"],
        guidance_scale=bins("guidance_scale"),
        stg_scale=bins("stg_scale"),
        rescale=bins("rescale"),
        stg_blocks=TimestepBins(edges, tuple(tuple(blocks) for blocks in data["stg_blocks"])),
    )
