"""Which rank computes which passes of a step that several GPUs share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement, pairwise

from stg_trt.errors import InvalidRequest
from stg_trt.models.passes import Pass, in_order
from stg_trt.models.plan import plan_step
from stg_trt.models.segment import Segment

MOST_RANKS = 5
"""Uncond, isolation, cond and two skip passes: no step has more."""


def check_ranks(ranks: int) -> None:
    """Raises InvalidRequest for a number of ranks that no step could use."""
    if type(ranks) is not int or not 1 <= ranks <= MOST_RANKS:
        raise InvalidRequest(
            f"guidance_parallel: expected a number of GPUs from 1 to {MOST_RANKS}, got {ranks!r}: a step has "
            "no more passes; use 2"
        )


def split_passes(
    segments: Sequence[Segment],
    passes: Sequence[Pass],
    ranks: int,
    per_row: Callable[[Segment], int],
    expert: int = 0,
) -> tuple[tuple[Pass, ...], ...]:
    """Neighbouring passes for each rank, so that the busiest has as few FLOPs as possible.

    A rank has none if there are fewer passes. `per_row` are a segment's FLOPs for one row.
    """
    ordered = in_order(passes)

    def flops(part: Sequence[Pass]) -> int:
        return plan_step(segments, ordered, expert, part).flops(per_row)

    def parts(cuts: tuple[int, ...]) -> tuple[tuple[Pass, ...], ...]:
        return tuple(ordered[start:stop] for start, stop in pairwise((0, *cuts, len(ordered))))

    splits = map(parts, combinations_with_replacement(range(len(ordered) + 1), ranks - 1))
    return min(splits, key=lambda split: sorted(map(flops, split), reverse=True))
