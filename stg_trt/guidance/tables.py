"""Spatiotemporal Skip Guidance (arXiv 2411.18664): per-step tables, and the arithmetic of one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stg_trt.errors import InvalidRequest
from stg_trt.guidance.presets import Blocks, BlockSets, Preset, Scale, T, TimestepBins, load_preset
from stg_trt.models.perturbation import Perturbation


def dynamic_cfg(scale: float, timesteps: Sequence[float]) -> list[float]:
    """1 + scale*(1 - cos(pi*((N - t)/N)^5))/2 for the timesteps t of N steps, as in CogVideoXPipeline.

    Its t counts training steps and its N those that are taken, so that the scale swings between 1 and
    1 + `scale` while t is above N.
    """
    steps = len(timesteps)
    parts = [((steps - timestep) / steps) ** 5 for timestep in timesteps]
    return [1 + scale * (1 - math.cos(math.pi * part)) / 2 for part in parts]


_OFF = Preset(0, 0, 0, "stg-a", False, guidance_scale=1.0, stg_scale=0.0, rescale=0.0, stg_blocks=())


@dataclass(frozen=True)
class Guidance:
    """Scales, rescale and perturbed blocks of every step; off is cfg 1, stg 0, rescale 0, no blocks.

    `embedded` is what a distilled model takes as an input on all steps; None is its family's default.
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
                f"embedded_guidance: expected a number that is finite, got {self.embedded}: correct the value"
            )
        if self.mode not in ("stg-a", "stg-r"):
            raise InvalidRequest(
                f"stg_mode: expected 'stg-a' or 'stg-r', got {self.mode!r}: choose one of the two"
            )
        for i, blocks in enumerate(self.blocks):
            if not all(type(block) is int and block >= 0 for block in blocks):
                raise InvalidRequest(
                    f"stg_blocks: expected block numbers from 0, got {blocks} at step {i}: correct it"
                )

    @classmethod
    def for_steps(
        cls,
        sigmas: Sequence[float],
        *,
        guidance_scale: Scale | None = None,
        stg_scale: Scale | None = None,
        rescale: Scale | None = None,
        stg_mode: str | None = None,
        stg_blocks: BlockSets | None = None,
        stg_range: tuple[int, int] | None = None,
        preset: str | None = None,
        cfg_zero_star: bool | None = None,
        embedded_guidance: float | None = None,
    ) -> Guidance:
        """Tables for the steps at `sigmas` (in 0..1 where bins read them).

        A scale is a number, a list with one entry per step, or TimestepBins; blocks likewise. STG is off
        outside the steps [start, stop) of `stg_range`. What is None comes from the preset, else it is off.
        Raises InvalidRequest for lists of the wrong length and values out of range.
        """
        given = load_preset(preset) if preset is not None else _OFF
        stg = _per_step("stg_scale", given.stg_scale if stg_scale is None else stg_scale, sigmas)
        guidance = cls(
            cfg_scale=_per_step(
                "guidance_scale", given.guidance_scale if guidance_scale is None else guidance_scale, sigmas
            ),
            stg_scale=_within(stg, stg_range),
            rescale=_per_step("rescale", given.rescale if rescale is None else rescale, sigmas),
            blocks=_blocks_per_step(given.stg_blocks if stg_blocks is None else stg_blocks, sigmas),
            mode=given.stg_mode if stg_mode is None else stg_mode,
            cfg_zero_star=given.cfg_zero_star if cfg_zero_star is None else cfg_zero_star,
            embedded=embedded_guidance,
        )
        for i, (scale, blocks) in enumerate(zip(guidance.stg_scale, guidance.blocks, strict=True)):
            if scale != 0 and not blocks:
                raise InvalidRequest(
                    f"stg_blocks: expected blocks for stg_scale {scale} at step {i}, got none: "
                    "name the blocks or set stg_scale to 0 there"
                )
        return guidance

    def passes(self, step: int) -> tuple[str, ...]:
        """The rows the step computes, of 'uncond', 'cond' and 'skip'."""
        uncond = ("uncond",) if self.cfg_scale[step] != 1 else ()
        skip = ("skip",) if self.stg_scale[step] != 0 and self.blocks[step] else ()
        return (*uncond, "cond", *skip)

    def perturbation(self, step: int) -> Perturbation | None:
        """What the step's skip row changes; None where it has no skip row."""
        return Perturbation(self.mode, self.blocks[step]) if "skip" in self.passes(step) else None


def _per_step(name: str, value: Scale, sigmas: Sequence[float]) -> tuple[float, ...]:
    if isinstance(value, TimestepBins):
        return _looked_up(name, value, sigmas)
    if isinstance(value, int | float):
        return (float(value),) * len(sigmas)
    _check_length(name, len(value), len(sigmas))
    return tuple(float(entry) for entry in value)


def _blocks_per_step(value: BlockSets, sigmas: Sequence[float]) -> tuple[Blocks, ...]:
    if isinstance(value, TimestepBins):
        return _looked_up("stg_blocks", value, sigmas)
    same = tuple(block for block in value if isinstance(block, int))
    if len(same) == len(value):
        return (same,) * len(sigmas)
    sets = tuple(tuple(blocks) for blocks in value if not isinstance(blocks, int))
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
