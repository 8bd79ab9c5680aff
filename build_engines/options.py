"""The options of a build, checked before anything is loaded."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from stg_trt.engines.backends import Backend, check_target
from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.passes import SkipBlocksByName, all_blocks, most_groups
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.plan import row_counts
from stg_trt.models.segment import TEXT, Segment, check_layout
from stg_trt.models.workload import Workload
from stg_trt.system.units import GIB

from .calibration_texts import read_prompts
from .segment_size import check_limit, fitting_bytes, split

_PLUGIN_BACKENDS = ("tensorrt", "tensorrt-rtx")
_REFITTING_BACKENDS = ("tensorrt", "tensorrt-rtx")
_OPTIMIZATION_LEVELS = range(6)
_CALIBRATION_STEPS = 8
_FLOAT8_BYTES = 1


@dataclass(frozen=True)
class CalibrationOptions:
    """The run that FP8 is calibrated on; None is the shipped prompts, and 8 steps."""

    prompts: tuple[str, ...] | None = None
    steps: int | None = None

    @classmethod
    def read(cls, prompts: str | Path | None, steps: int | None) -> CalibrationOptions:
        """With the prompts of a file; raises InvalidRequest if it has none."""
        return cls(None if prompts is None else read_prompts(Path(prompts)), steps)

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return _CALIBRATION_STEPS if self.steps is None else self.steps

    def check(self, family: ModelFamily, workload: Workload) -> None:
        """Raises InvalidRequest for a model that cannot be FP8, and for options that change nothing."""
        if workload.is_float8 and family.float8 is None:
            raise InvalidRequest(
                f"precision: expected a transformer for fp8, got {family.name}: use --precision bf16"
            )
        given = {"calibration_prompts": self.prompts, "calibration_steps": self.steps}
        for name in (name for name, value in given.items() if value is not None):
            if not workload.is_float8:
                raise InvalidRequest(
                    f"{name}: expected none for {workload.precision}, which is not calibrated, got one: "
                    "leave it out, or use --precision fp8"
                )
        if self.num_steps < 1:
            raise InvalidRequest(
                f"calibration_steps: expected at least 1, got {self.steps}: use {_CALIBRATION_STEPS}"
            )


@dataclass(frozen=True)
class BuildOptions:
    """One model at one size in one layout, for one backend and one or more of its targets."""

    checkpoint: Checkpoint
    output: Path
    workload: Workload
    skips: SkipBlocksByName
    stg_mode: str
    layout: str
    max_batch: int
    backend: Backend
    targets: tuple[str, ...]
    verify_timesteps: int
    keep_onnx: bool
    plugins: tuple[str, ...] = ()
    builder_optimization_level: int | None = None
    refittable: bool = False
    max_segment_gib: float | None = None
    calibration: CalibrationOptions = CalibrationOptions()

    def __post_init__(self) -> None:
        check_layout(self.layout)
        if self.max_batch < 1:
            raise InvalidRequest(f"max_batch: expected at least 1, got {self.max_batch}: use 1")
        if self.verify_timesteps < 0:
            raise InvalidRequest(f"verify_timesteps: expected 0 or more, got {self.verify_timesteps}: use 3")
        if self.layout == "twin" and not self.stg_blocks:
            raise InvalidRequest("stg_blocks: expected blocks for the twin layout, got none: name them")
        if self.layout == "twin" and len(self.skips) > 1:
            raise InvalidRequest(
                f"stg_blocks: expected one skip pass for the twin layout, got {', '.join(self.skips)}: name "
                "one, or use --layout segmented"
            )
        for target in self.targets:
            check_target(self.backend, target, self.workload.precision)
        self._check_plugins()
        self._check_level()
        self._check_refittable()
        self.calibration.check(self.checkpoint.family, self.workload)
        self.checkpoint.family.check(self.workload)
        self._check_segment_size()
        assert self.segments

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """In the order they run, expert by expert; the projection of the text first.

        Runs of blocks that are larger than an engine may be are several segments.
        """
        blocks = self.checkpoint.family.segments(self.layout, self.stg_mode, self.stg_blocks)
        if self._can_split:
            limit = fitting_bytes() if self.max_segment_gib is None else int(self.max_segment_gib * GIB)
            blocks = split(blocks, self.block_bytes, limit)
        return self._of_experts(blocks)

    @property
    def segmented(self) -> tuple[Segment, ...]:
        """The segments, or those that the other layout would have: a plan shares its prefix in them."""
        if self.layout == "segmented":
            return self.segments
        family = self.checkpoint.family
        return self._of_experts(family.segments("segmented", self.stg_mode, self.stg_blocks))

    def _of_experts(self, blocks: tuple[Segment, ...]) -> tuple[Segment, ...]:
        """The segments of a transformer for each of them, with that of the text."""
        family = self.checkpoint.family
        segments = (TEXT, *blocks) if family.has_text_segment else blocks
        experts = range(len(family.transformers))
        return tuple(segment.of_expert(expert) for expert in experts for segment in segments)

    @cached_property
    def block_values(self) -> Counter[int | None]:
        """How many values the weights of each block have; None is for those of no block."""
        counted: Counter[int | None] = Counter()
        for name, weight in self.checkpoint.load_transformer((), ends=False).state_dict().items():
            counted[self.checkpoint.family.block_of(name)] += weight.numel()
        return counted

    @property
    def weight_bytes(self) -> int:
        """Of a weight in the engines at least; a few stay float32, and some layers are not FP8."""
        return _FLOAT8_BYTES if self.workload.is_float8 else self._dtype.itemsize

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.workload.dtype)
        return dtype

    @property
    def block_bytes(self) -> dict[int | None, int]:
        """Of the weights of each block in the engines at most; FP8 ones count as the others."""
        return {block: values * self._dtype.itemsize for block, values in self.block_values.items()}

    @property
    def _can_split(self) -> bool:
        # The engines of a twin are whole models.
        return self.layout == "segmented" and self.checkpoint.family.splits_runs

    @property
    def stg_blocks(self) -> tuple[int, ...]:
        """All blocks that a skip pass may perturb: there the model is cut."""
        return all_blocks(self.skips)

    @property
    def _most_passes(self) -> int:
        """Uncond, cond, the isolation pass if there is one, and as many skip passes as were named."""
        return self._groups(len(self.skips))

    def _groups(self, skips: int) -> int:
        return most_groups(skips, self.checkpoint.family.isolates)

    @property
    def name(self) -> str:
        """Tells the build from others in a folder, apart from weights and versions."""
        blocks = ".".join(map(str, self.stg_blocks)) or "none"
        return f"{self.layout}-{self.stg_mode}-{blocks}-{self.workload}-{self.backend.name}"

    def rows(self, segment: Segment) -> tuple[int, int, int]:
        """(min, opt, max) rows: opt is what a CFG+STG step of `max_batch` videos runs the segment with."""
        plain = segment.front and (not segment.back or self.layout == "twin")
        left = sum(blocks[0] <= segment.start for blocks in self.skips.values())
        after = self._most_passes if segment.text or segment.front else self._groups(left)
        passes = 1 if segment.skipped else self._groups(1) - 1 if plain else after
        return 1, passes * self.max_batch, self._most_passes * self.max_batch

    def row_counts(self, segment: Segment) -> tuple[int, ...]:
        """All numbers of rows that a step of up to `max_batch` videos can run the segment with."""
        built = Perturbation(self.stg_mode, self.stg_blocks)
        segments = [other for other in self.segments if not other.text]
        per_video = {self._most_passes}
        if not segment.text:
            skips, isolates = max(1, len(self.skips)), self.checkpoint.family.isolates
            per_video = set(row_counts(segments, segment, built, skips, isolates))
        videos = range(1, self.max_batch + 1)
        return tuple(sorted({rows * count for rows in per_video for count in videos}))

    def _check_segment_size(self) -> None:
        """Raises InvalidRequest for a limit that is none, or that these engines cannot keep."""
        gib = self.max_segment_gib
        if gib is None:
            return
        if not 0 < gib < math.inf:
            raise InvalidRequest(f"max_segment_gib: expected a number above 0, got {gib:g}: such as 4")
        if not self._can_split:
            raise InvalidRequest(
                f"max_segment_gib: expected a transformer in the segmented layout, got "
                f"{self.checkpoint.family.name} in the {self.layout} layout, whose engines are not split: "
                "leave it out"
            )
        check_limit(gib, self.block_bytes)

    def _check_level(self) -> None:
        """Raises InvalidRequest for a level that TensorRT does not have, or that changes nothing."""
        level = self.builder_optimization_level
        if level is None:
            return
        if self.backend.name != "tensorrt":
            raise InvalidRequest(
                f"builder_optimization_level: expected the backend tensorrt, got {self.backend.name}, whose "
                "engines are the same at every level: leave it out"
            )
        if level not in _OPTIMIZATION_LEVELS:
            raise InvalidRequest(
                f"builder_optimization_level: expected 0 to {_OPTIMIZATION_LEVELS[-1]}, got {level}: 3 is "
                "TensorRT's own, 5 builds longest"
            )

    def _check_refittable(self) -> None:
        """Raises InvalidRequest where other weights need no compilation, or more than a refit."""
        if self.refittable and self.backend.name not in _REFITTING_BACKENDS:
            raise InvalidRequest(
                f"refittable: expected the backend {' or '.join(_REFITTING_BACKENDS)}, got "
                f"{self.backend.name}, which compiles nothing for other weights: leave it out"
            )
        if self.refittable and self.workload.is_float8:
            raise InvalidRequest(
                "refittable: expected bf16, got fp8, whose scales decide the graph: use --precision bf16, or "
                "leave it out"
            )

    def _check_plugins(self) -> None:
        """Raises InvalidRequest for a plugin that the family or the backend has no use for."""
        family = self.checkpoint.family
        unknown = sorted(set(self.plugins) - family.plugins)
        if unknown:
            raise InvalidRequest(
                f"plugins: expected some of {', '.join(sorted(family.plugins)) or 'none'} for {family.name}, "
                f"got {', '.join(unknown)}: leave them out"
            )
        if self.plugins and self.backend.name not in _PLUGIN_BACKENDS:
            raise InvalidRequest(
                f"plugins: expected the backend {' or '.join(_PLUGIN_BACKENDS)} for "
                f"{', '.join(self.plugins)}, got {self.backend.name}: leave --plugins out"
            )
