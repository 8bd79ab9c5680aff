"""What a backend does for a build: a segment's modules to files, and what the gates measure on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import TensorSpec
from stg_trt.models.workload import Workload

from .options import BuildOptions
from .piece_key import PieceKey
from .reusable_files import ReusableFiles

Rows = tuple[int, int, int]
"""The rows of a profile: min, opt, max."""

Run = Callable[[dict[str, Tensor]], list[Tensor]]
"""Outputs of a segment or a piece, in order, for its inputs by name, on the CPU."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Distance:
    """How far one tensor is from another."""

    cosine: float
    relative_l2: float
    max_abs: float


@dataclass(frozen=True)
class Tolerance:
    """How far from float32 a segment may be."""

    relative_l2: float
    cosine: float

    def allows(self, found: Distance) -> bool:
        """Whether the distance is inside; that of NaN is not."""
        return found.relative_l2 <= self.relative_l2 and found.cosine >= self.cosine


# Float32 against float32: what is left is the order of summation.
FLOAT32 = Tolerance(1e-4, 1 - 1e-6)
# Rounding after every operation of a segment's blocks, with which eager bfloat16 stays below half of this.
BFLOAT16 = Tolerance(3e-2, 1 - 1e-3)
# Against float32 with the same FP8 layers: a number in the middle of two may become the other one, which
# rounding to bfloat16 in between makes more common.
FLOAT8 = Tolerance(2e-2, 1 - 1e-3)
FLOAT8_BFLOAT16 = Tolerance(6e-2, 1 - 2e-3)


def tolerance_of(workload: Workload) -> Tolerance:
    """What engines may differ by from float32 with their weights."""
    wide = workload.dtype == "float32"
    if workload.is_float8:
        return FLOAT8 if wide else FLOAT8_BFLOAT16
    return FLOAT32 if wide else BFLOAT16


@dataclass(frozen=True)
class Job:
    """One segment of a build, with its borders; files are written to `work`."""

    segment: Segment
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    rows: Rows
    work: Path
    on_progress: Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What all targets are compiled from; `reused` if earlier builds had exported all of it."""

    sha256: str
    reused: bool = False


class SegmentExport(ABC):
    """The export of one segment, which grows by its pieces in the order they run."""

    @abstractmethod
    def append(self, piece: Segment, module: SegmentModule) -> Callable[[], Run] | None:
        """Adds a piece, its module in the engine's precision; raises GateMissed if its rows froze.

        Loads what was made of it, where its numerics are those of the engines.
        """

    @abstractmethod
    def finish(self) -> Exported:
        """All pieces in one."""


@dataclass(frozen=True)
class Compiled:
    """Finished files, the engine's own first, and what the gates measured, None where it cannot be known.

    `runner` loads the engine, where only it shows the numerics. `commands` of other tools do the same.
    `attention_kernels` are those of the fused attentions, where their names are known. `structure_sha256` is
    of the graph of an engine that can be refitted, without its weights; `refitted` if this one was.
    """

    files: tuple[Path, ...]
    fused_attentions: int | None
    activation_bytes: int | None
    runner: Callable[[], Run] | None = None
    commands: tuple[str, ...] = ()
    attention_kernels: tuple[str, ...] = ()
    structure_sha256: str | None = None
    refitted: bool = False


class Compiler(ABC):
    """One backend in one build. `expand_masks`: whether attention masks have the query length."""

    expand_masks: ClassVar[bool] = False
    opset: ClassVar[int | None] = None

    def __init__(self, options: BuildOptions) -> None:
        self.options = options

    @property
    @abstractmethod
    def version(self) -> str:
        """The version of what compiles; BackendUnavailable where it cannot."""

    @property
    def tolerance(self) -> Tolerance:
        """What the numerics gate allows."""
        return FLOAT32

    def flags(self, target: str) -> tuple[str, ...]:
        """Options and facts of the compilation that belong to the engine's key."""
        return ()

    def profiles(self, segment: Segment) -> tuple[Rows, ...]:
        """The rows that the segment's engine is compiled for; a context picks the profile of its own."""
        return (self.options.rows(segment),)

    def piece_key(self, piece: Segment, module: SegmentModule, max_rows: int) -> PieceKey:
        """Decides whether a piece, with its module as it is now, needs an export of its own."""
        family, workload = self.options.checkpoint.family, self.options.workload
        return PieceKey.of(module, family.inputs(piece, workload), family.outputs(piece, workload), max_rows)

    def reference_device(self) -> torch.device:
        """Where the eager reference runs."""
        return CPU

    @abstractmethod
    def export(self, job: Job) -> SegmentExport:
        """Begins the export of a segment, which is made once for all targets."""

    @abstractmethod
    def compile(self, job: Job, exported: Exported, target: str, finished: ReusableFiles) -> Compiled:
        """For one target, in `job.work`; what `finished` has need not be compiled again."""

    def keep(self, work: Path) -> None:
        """Keeps what later builds with other weights need of the finished segment, made in `work`."""
        return
