"""One family for the tests: a tiny checkpoint, its diffusers model, and facts to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload

GOLDENS = Path(__file__).parents[2] / "goldens"
TIMESTEP = 731.0
Grid = tuple[int, int, int]
SMALL_TILES = {
    "tile_sample_min_height": 32,
    "tile_sample_min_width": 40,
    "tile_sample_stride_height": 16,
    "tile_sample_stride_width": 24,
}
Predict = Callable[[Any, Tensor, TextCondition], Tensor]
Tables = Callable[[Any, Grid, float], dict[str, Tensor]]
Refused = tuple[dict[str, Any], dict[str, Any], str]


class Sizes(TypedDict):
    """The sizes of a build, as `build` and `Workload` take them."""

    height: int
    width: int
    num_frames: int
    text_length: int


class SomeSizes(TypedDict, total=False):
    """Sizes to change in others."""

    height: int
    width: int
    num_frames: int
    text_length: int


@dataclass(frozen=True)
class Published:
    """A published configuration at one size, and the TFLOP of a forward of one row there."""

    name: str
    workload: Workload
    latents: tuple[int, ...]
    packed: tuple[int, ...]
    teraflops: float

    def __str__(self) -> str:
        return f"{self.name}-{self.workload}"


@dataclass(frozen=True, eq=False)
class FamilyCase:
    """One family. `goldens` holds the tiny transformer; it has four blocks or more.

    `predict` is one pass of diffusers' model at TIMESTEP with what its pipeline passes. `tables` are its
    position tables, by the names of our constants, for a grid of latents and a frame rate. `video` says which
    tokens of a joint attention are the video's; None if the self-attention has no others. `padding` says
    what becomes of text tokens that are none: masked by the constant `mask_name`, zeroed, or kept as text.
    `cut_at` and `twins`, (mode, blocks), are what the goldens perturb. `wide` words are in the names of
    weights that stay float32, `narrow` ones are modules of others. `refused` are changes to the
    configurations of transformer and VAE, and what is said of them. `refused_steps` are a scheduler, a
    number of steps, and what is said of them. `rounding` is how far float32 lets the cut model be from
    diffusers'. `variants` are changes
    to the transformer's configuration that work too. `vae_tiles` are attributes of the small pipeline's VAE
    that make its tiles smaller than the frames of SIZES; none if its configuration does. `noisy_vae` are
    entries of the VAE's configuration with which its decoding takes noise, and `decode_options` go with them.
    """

    goldens: Path
    sizes: Sizes
    grid: Grid
    model_class: Any
    predict: Predict
    tables: Tables
    table_sizes: tuple[tuple[SomeSizes, Grid], ...]
    video: slice | None
    padding: Literal["masked", "zeroed", "kept"]
    golden_names: tuple[str, ...]
    cut_at: tuple[int, ...]
    twins: tuple[tuple[str, tuple[int, ...]], ...]
    wide: tuple[str, ...]
    narrow: frozenset[str]
    refused_sizes: tuple[tuple[SomeSizes, str], ...]
    refused: tuple[Refused, ...]
    refused_indexes: tuple[tuple[dict[str, Any], str], ...]
    published: tuple[Published, ...]
    pipeline_class: Any
    save_pipeline: Callable[[Path], None]
    schedulers: tuple[Any, ...]
    mask_name: str = ""
    refused_steps: tuple[tuple[Any, int, str], ...] = ()
    rounding: float = 1e-6
    variants: tuple[dict[str, Any], ...] = ()
    vae_tiles: Mapping[str, int] = field(default_factory=dict)
    noisy_vae: Mapping[str, Any] = field(default_factory=dict)
    decode_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def workload(self) -> Workload:
        """The sizes of the goldens."""
        return Workload(**self.sizes)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The tiny transformer."""
        return Checkpoint.open(self.goldens)

    @cached_property
    def family(self) -> ModelFamily:
        """Of the tiny transformer."""
        return self.checkpoint.family

    def latents(self, rows: int) -> Tensor:
        """Standard normal, in the layout that the transformer takes."""
        shape = self.family.tensors(self.workload)["latents"].with_rows(rows)
        return torch.randn(shape, generator=torch.Generator().manual_seed(7))

    def text(self, rows: int, seed: int = 0) -> TextCondition:
        """Embeddings of which each row has another number of real tokens."""
        generator = torch.Generator().manual_seed(seed)
        text = self.family.random_text(self.workload, rows, generator)
        real = torch.arange(self.workload.text_length) < torch.arange(3, 3 + rows)[:, None]
        return replace(text, mask=real.float())

    def __str__(self) -> str:
        return self.goldens.name
