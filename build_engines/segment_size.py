"""How large an engine may be: long runs of blocks become several, so that a build fits the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from stg_trt.errors import InvalidRequest
from stg_trt.models.segment import Segment
from stg_trt.system.machine_memory import total_bytes
from stg_trt.system.units import GIB

# What a build takes at its peak: so much for every byte of the engine's weights, and so much in any case.
_PEAK_PER_BYTE = 1.5
_PEAK_IN_ANY_CASE = 4 * GIB


def fitting_bytes() -> int:
    """The weights of the largest engine that this machine can compile."""
    return max(GIB, int((total_bytes() - _PEAK_IN_ANY_CASE) / _PEAK_PER_BYTE))


def split(
    segments: Sequence[Segment], block_bytes: Mapping[int | None, int], limit: int
) -> tuple[Segment, ...]:
    """The segments, those of several blocks in parts of at most `limit` bytes of weights, about equal.

    A block is never split: one that is larger is a part of its own. Embedding and head, which are small, are
    not counted.
    """
    return tuple(part for segment in segments for part in _parts(segment, block_bytes, limit))


def _parts(segment: Segment, block_bytes: Mapping[int | None, int], limit: int) -> tuple[Segment, ...]:
    total = sum(block_bytes[block] for block in segment.blocks)
    if total <= limit or len(segment.blocks) < 2:
        return (segment,)
    # As many as are needed, each with its share.
    share, stops, filled = total / -(-total // limit), [], 0
    for block in segment.blocks:
        size = block_bytes[block]
        if filled and (filled + size > limit or filled + size / 2 > share):
            stops.append(block)
            filled = 0
        filled += size
    return tuple(segment.part(start, stop) for start, stop in pairwise((segment.start, *stops, segment.stop)))


def check_limit(gib: float, block_bytes: Mapping[int | None, int]) -> None:
    """Raises InvalidRequest for a limit that the largest block does not fit."""
    largest = max(size for block, size in block_bytes.items() if block is not None)
    if gib * GIB < largest:
        raise InvalidRequest(
            f"max_segment_gib: expected at least {largest / GIB:.3g}, the weights of the largest block, got "
            f"{gib:g}: a block is never split"
        )
