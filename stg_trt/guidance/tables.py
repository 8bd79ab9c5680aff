"""Spatiotemporal Skip Guidance (arXiv 2411.18664): per-step tables, and the arithmetic of one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from stg_trt.errors import InvalidRequest
from stg_trt.guidance.bins import Blocks, BlockSets, Scale, T, TimestepBins
from stg_trt.guidance.resolved import OFF, ResolvedGuidance
from stg_trt.models.passes import Pass
from stg_trt.models.perturbation import Perturbation, check_mode


def dynamic_cfg(scale: float, timesteps: Sequence[float]) -> list[float]:
    """1 + scale*(1 - cos(pi*((N - t)/N)^5))/2 for the timesteps t of N steps, as in CogVideoXPipeline.

    Its t counts training steps and its N those that are taken, so that the scale swings between 1 and
    1 + `scale` while t is above N.
    """
    steps = len(timesteps)
    parts = [((steps - timestep) / steps) ** 5 for timestep in timesteps]
    return [1 + scale * (1 - math.cos(math.pi * part)) / 2 for part in parts]


@dataclass(frozen=True)
class Guidance:
    """Scales, rescale and perturbed blocks of every step; off is cfg 1, stg 0, rescale 0, no blocks.

    `embedded` is the guidance input of a distilled model on all steps; None is its family's default.
    """

    cfg_scale: tuple[float, ...]
    stg_scale: tuple[float, ...]
    rescale: tuple[float, ...]
    blocks: tuple[Blocks, ...]
    mode: str = "stg-a"
    cfg_zero_star: bool = False
    embedded: float | None = None

    def __post_init__(self) -> None:
        for name in ("stg_scale", "rescale", "blocks"):
            _check_length(name, len(getattr(self, name)), len(self.cfg_scale))
        _check_values("guidance_scale", self.cfg_scale, -math.inf, math.inf)
        _check_values("stg_scale", self.stg_scale, 0, math.inf)
        _check_values("rescale", self.rescale, 0, 1)
        if self.embedded is not None and not math.isfinite(self.embedded):
            raise InvalidRequest(
                f"guidance_scale: expected a number that is finite, got {self.embedded}: correct the value"
            )
        check_mode(self.mode)
        for i, blocks in enumerate(self.blocks):
            if not all(type(block) is int and block >= 0 for block in blocks):
                raise InvalidRequest(
                    f"stg_blocks: expected block numbers from 0, got {blocks} at step {i}: correct it"
                )

    @classmethod
    def for_steps(
        cls,
        sigmas: Sequence[float],
        given: ResolvedGuidance = OFF,
        timesteps: Sequence[float] = (),
    ) -> Guidance:
        """Tables for the steps at `sigmas` (in 0..1 if bins read them).

        `timesteps` are the scheduler's, for `use_dynamic_cfg` alone. Raises InvalidRequest for lists of the
        wrong length, values out of range, and STG without blocks.
        """
        stg = _per_step("stg_scale", given.stg_scale, sigmas)
        cfg = _swinging(given.guidance_scale, timesteps) if given.use_dynamic_cfg else given.guidance_scale
        guidance = cls(
            # As diffusers' pipelines decide it: at 1 and below, there is no CFG.
            cfg_scale=tuple(max(scale, 1.0) for scale in _per_step("guidance_scale", cfg, sigmas)),
            stg_scale=_within(stg, given.stg_range),
            rescale=_per_step("rescale", given.rescale, sigmas),
            blocks=_blocks_per_step(given.stg_blocks, sigmas),
            mode=given.stg_mode,
            cfg_zero_star=given.cfg_zero_star,
            embedded=given.embedded_guidance,
        )
        for i, (scale, blocks) in enumerate(zip(guidance.stg_scale, guidance.blocks, strict=True)):
            if scale != 0 and not blocks:
                raise InvalidRequest(
                    f"stg_blocks: expected blocks for stg_scale {scale} at step {i}, got none: "
                    "name the blocks or set stg_scale to 0 there"
                )
        return guidance

    @property
    def num_steps(self) -> int:
        """Steps that the tables are for."""
        return len(self.cfg_scale)

    @property
    def needs_uncond(self) -> bool:
        """Whether any step computes the unconditional pass."""
        return any("uncond" in self.passes(step) for step in range(self.num_steps))

    @property
    def perturbations(self) -> frozenset[Perturbation]:
        """All that the steps perturb."""
        return frozenset(filter(None, map(self.perturbation, range(self.num_steps))))

    def passes(self, step: int) -> tuple[Pass, ...]:
        """The passes that the step computes, in the order of their rows."""
        uncond: tuple[Pass, ...] = ("uncond",) if self.cfg_scale[step] != 1 else ()
        skip: tuple[Pass, ...] = ("skip",) if self.stg_scale[step] != 0 and self.blocks[step] else ()
        return (*uncond, "cond", *skip)

    def perturbation(self, step: int) -> Perturbation | None:
        """The perturbation of the step's skip pass; None if it has no skip pass."""
        return Perturbation(self.mode, self.blocks[step]) if "skip" in self.passes(step) else None


def _swinging(scale: Scale, timesteps: Sequence[float]) -> list[float]:
    """The scales of use_dynamic_cfg; at 1 and below there is no guidance that could change."""
    if not isinstance(scale, int | float | Real) or float(scale) <= 1:
        raise InvalidRequest(
            f"use_dynamic_cfg: expected guidance_scale as one number above 1, got {scale}: give one, or turn "
            "use_dynamic_cfg off"
        )
    return dynamic_cfg(float(scale), timesteps)


def _per_step(name: str, value: Scale, sigmas: Sequence[float]) -> tuple[float, ...]:
    if isinstance(value, TimestepBins):
        return _looked_up(name, value, sigmas)
    if isinstance(value, int | float | Real):
        return (float(value),) * len(sigmas)
    _check_length(name, len(value), len(sigmas))
    return tuple(float(entry) for entry in value)


def _blocks_per_step(value: BlockSets, sigmas: Sequence[float]) -> tuple[Blocks, ...]:
    if isinstance(value, TimestepBins):
        return _looked_up("stg_blocks", value, sigmas)
    if isinstance(value, int | Integral):
        return ((int(value),),) * len(sigmas)
    same = tuple(int(block) for block in value if isinstance(block, int | Integral))
    if len(same) == len(value):
        return (same,) * len(sigmas)
    sets = tuple(tuple(map(int, blocks)) for blocks in value if not isinstance(blocks, int | Integral))
    if len(sets) != len(value):
        raise InvalidRequest(
            f"stg_blocks: expected block numbers or one list of them per step, got {value}: do not mix them"
        )
    _check_length("stg_blocks", len(sets), len(sigmas))
    return sets


def _looked_up(name: str, bins: TimestepBins[T], sigmas: Sequence[float]) -> tuple[T, ...]:
    for i, sigma in enumerate(sigmas):
        if not 0 <= sigma <= 1:
            raise InvalidRequest(
                f"{name}: bins expected sigmas in 0..1, got {sigma} at step {i}: "
                "divide timesteps by the training steps"
            )
    return tuple(bins.at(sigma) for sigma in sigmas)


def _within(scale: tuple[float, ...], steps: tuple[int, int] | None) -> tuple[float, ...]:
    """The scale inside [start, stop), 0 outside."""
    if steps is None:
        return scale
    start, stop = steps
    if not 0 <= start < stop <= len(scale):
        raise InvalidRequest(
            f"stg_range: expected 0 <= start < stop <= {len(scale)} steps, got ({start}, {stop}): "
            "correct the range"
        )
    return tuple(value if start <= i < stop else 0.0 for i, value in enumerate(scale))


def _check_length(name: str, got: int, steps: int) -> None:
    if got != steps:
        raise InvalidRequest(
            f"{name}: expected {steps} entries, one per step, got {got}: give one per step or a single value"
        )


def _check_values(name: str, values: tuple[float, ...], low: float, high: float) -> None:
    for i, value in enumerate(values):
        if not (math.isfinite(value) and low <= value <= high):
            bounds = f"from {low} to {high}" if low > -math.inf else "that is finite"
            raise InvalidRequest(
                f"{name}: expected a number {bounds}, got {value} at step {i}: correct the value"
            )
