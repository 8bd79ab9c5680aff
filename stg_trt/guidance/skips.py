"""The skip passes of a call: their names, and each one's scale and blocks at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stg_trt.errors import InvalidRequest
from stg_trt.guidance.bins import Blocks
from stg_trt.guidance.per_step import blocks_per_step, check_length, check_values, per_step, within
from stg_trt.guidance.resolved import ResolvedGuidance
from stg_trt.models.passes import SKIP, Pass, check_pass_names
from stg_trt.models.perturbation import Perturbation, check_mode


@dataclass(frozen=True)
class SkipSchedule:
    """A named skip pass at every step; it is off where its scale is 0."""

    scale: tuple[float, ...]
    blocks: tuple[Blocks, ...]
    mode: str = "stg-a"
    name: str = SKIP

    def __post_init__(self) -> None:
        check_pass_names([self.name])
        check_length("blocks", len(self.blocks), len(self.scale))
        check_values("stg_scale", self.scale, 0, math.inf)
        check_mode(self.mode)
        for i, blocks in enumerate(self.blocks):
            if not all(type(block) is int and block >= 0 for block in blocks):
                raise InvalidRequest(
                    f"stg_blocks: expected block numbers from 0, got {blocks} at step {i}: correct it"
                )
            if self.scale[i] != 0 and not blocks:
                raise InvalidRequest(
                    f"stg_blocks: expected blocks for stg_scale {self.scale[i]} at step {i}, got none: "
                    "name the blocks or set stg_scale to 0 there"
                )

    @classmethod
    def for_steps(cls, sigmas: Sequence[float], given: ResolvedGuidance) -> tuple[SkipSchedule, ...]:
        """The skip passes of the steps at `sigmas` (in 0..1 if bins read them); those never on are left out.

        Raises InvalidRequest for lists of the wrong length, values out of range, scales without their blocks.
        """
        blocks = given.stg_blocks if isinstance(given.stg_blocks, Mapping) else {SKIP: given.stg_blocks}
        scales = given.stg_scale
        if not isinstance(scales, Mapping):
            scales = dict.fromkeys(blocks, scales)
        if set(scales) != set(blocks):
            raise InvalidRequest(
                f"stg_scale: expected a scale for each of {', '.join(blocks)}, the passes of stg_blocks, got "
                f"{', '.join(scales) or 'none'}: give stg_blocks and stg_scale the same names"
            )
        schedules = (
            cls(
                within(per_step("stg_scale", scales[name], sigmas), given.stg_range),
                blocks_per_step(blocks[name], sigmas),
                given.stg_mode,
                name,
            )
            for name in blocks
        )
        return tuple(schedule for schedule in schedules if any(schedule.scale))

    def is_on(self, step: int) -> bool:
        """Whether the step computes the pass."""
        return self.scale[step] != 0

    def at(self, step: int) -> Pass:
        """The pass, as the step perturbs it."""
        return Pass(self.name, Perturbation(self.mode, self.blocks[step]))
