"""One value per step, from what a call may give: a number, a list, or bins over the noise level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

from stg_trt.errors import InvalidRequest
from stg_trt.guidance.bins import Blocks, BlockSets, Scale, T, TimestepBins


def per_step(name: str, value: Scale, sigmas: Sequence[float]) -> tuple[float, ...]:
    """A scale at the steps' sigmas; raises InvalidRequest for a list of another length."""
    if isinstance(value, TimestepBins):
        return _looked_up(name, value, sigmas)
    if isinstance(value, int | float | Real):
        return (float(value),) * len(sigmas)
    check_length(name, len(value), len(sigmas))
    return tuple(float(entry) for entry in value)


def blocks_per_step(value: BlockSets, sigmas: Sequence[float]) -> tuple[Blocks, ...]:
    """The blocks at the steps' sigmas; raises InvalidRequest for a list of another length."""
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
    check_length("stg_blocks", len(sets), len(sigmas))
    return sets


def _looked_up(name: str, bins: TimestepBins[T], sigmas: Sequence[float]) -> tuple[T, ...]:
    for i, sigma in enumerate(sigmas):
        if not 0 <= sigma <= 1:
            raise InvalidRequest(
                f"{name}: bins expected sigmas in 0..1, got {sigma} at step {i}: "
                "divide timesteps by the training steps"
            )
    return tuple(bins.at(sigma) for sigma in sigmas)


def within(scale: tuple[float, ...], steps: tuple[int, int] | None) -> tuple[float, ...]:
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


def check_length(name: str, got: int, steps: int) -> None:
    """Raises InvalidRequest unless there is one entry per step."""
    if got != steps:
        raise InvalidRequest(
            f"{name}: expected {steps} entries, one per step, got {got}: give one per step or a single value"
        )


def check_values(name: str, values: tuple[float, ...], low: float, high: float) -> None:
    """Raises InvalidRequest for a value out of range."""
    for i, value in enumerate(values):
        if not (math.isfinite(value) and low <= value <= high):
            bounds = f"from {low} to {high}" if low > -math.inf else "that is finite"
            raise InvalidRequest(
                f"{name}: expected a number {bounds}, got {value} at step {i}: correct the value"
            )
