"""What the tests know of one family: a tiny checkpoint, its uncut model, and facts to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stg_trt.checkpoint import Checkpoint
from stg_trt.families.base import ModelFamily, TextCondition, Workload

GOLDENS = Path(__file__).parents[1] / "goldens"
TIMESTEP = 731.0
Sizes = dict[str, int]
Grid = tuple[int, int, int]
Uncut = Callable[[Any, Tensor, TextCondition], Tensor]
Tables = Callable[[Any, Grid, float], dict[str, Tensor]]


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


@dataclass(frozen=True)
class FamilyCase:
    """One family. `goldens` holds the tiny transformer; it has four blocks or more.

    `uncut` is one pass of diffusers' model at TIMESTEP with what its pipeline passes. `tables` are its
    position tables, by the names of our constants, for a grid of latents and a frame rate. `video` says which
    tokens of a joint attention are the video's; None where the self-attention has no others. `padding` says
    what becomes of text tokens that are none: masked by the constant `mask_name`, zeroed, or kept as text.
    `cut_at` and `twins`, (mode, blocks), are what the goldens perturb. `wide` words are in the names of
    weights that stay float32, `narrow` ones are modules of others. `refused` are changes to the
    configurations of transformer and VAE, and what is said of them. `refused_steps` are a scheduler, a
    number of steps, and what is said of them. `rounding` is how far float32 lets the cut model be from the
    uncut one.
    """

    goldens: Path
    sizes: Sizes
    grid: Grid
    model_class: Any
    uncut: Uncut
    tables: Tables
    table_sizes: tuple[tuple[Sizes, Grid], ...]
    video: slice | None
    padding: Literal["masked", "zeroed", "kept"]
    golden_names: tuple[str, ...]
    cut_at: tuple[int, ...]
    twins: tuple[tuple[str, tuple[int, ...]], ...]
    wide: tuple[str, ...]
    narrow: frozenset[str]
    refused_sizes: tuple[tuple[Sizes, str], ...]
    refused: tuple[tuple[dict[str, Any], dict[str, Any], str], ...]
    refused_indexes: tuple[tuple[dict[str, Any], str], ...]
    published: tuple[Published, ...]
    pipeline_class: Any
    save_pipeline: Callable[[Path], None]
    schedulers: tuple[Any, ...]
    mask_name: str = ""
    refused_steps: tuple[tuple[Any, int, str], ...] = ()
    rounding: float = 1e-6

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
        shape = self.family.tensors(self.workload)["prompt_embeds"].with_rows(rows)
        mask = (torch.arange(shape[1]) < torch.arange(3, 3 + rows)[:, None]).float()
        return TextCondition(torch.randn(shape, generator=generator), mask)

    def __str__(self) -> str:
        return self.goldens.name
