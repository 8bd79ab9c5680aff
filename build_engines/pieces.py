"""The pieces that a segment is exported as: most blocks of a model differ in their weights' values alone."""

from __future__ import annotations

from dataclasses import replace

from stg_trt.models.perturbation import Perturbation
from stg_trt.models.segment import Segment

_BLOCK = "block"


def pieces_of(segment: Segment) -> tuple[Segment, ...]:
    """Embedding, blocks one by one, head; a block that no row computes is no piece."""
    blocks = [_block(segment, block) for block in segment.blocks if not _is_left_out(segment, block)]
    if not blocks:
        return (segment,)
    embedding = Segment("embedding", segment.start, segment.start, front=True, expert=segment.expert)
    head = Segment("head", segment.stop, segment.stop, back=True, expert=segment.expert)
    return (*([embedding] if segment.front else []), *blocks, *([head] if segment.back else []))


def label_of(piece: Segment) -> str:
    """A piece in words: embedding, block 3, head, or the segment that it is."""
    return f"block {piece.start}" if piece.name == _BLOCK else piece.name


def _block(segment: Segment, block: int) -> Segment:
    """One block, perturbed as the segment perturbs it."""
    piece = Segment(_BLOCK, block, block + 1, keep_input=segment.keep_input, expert=segment.expert)
    piece = replace(piece, indexed_before=segment.indexed_before)
    if segment.skipped is None:
        return replace(piece, stg_r_inside=segment.stg_r_inside)
    if block not in segment.skipped.blocks:
        return piece
    skipped = Perturbation(segment.skipped.mode, (block,))
    return replace(piece, skipped=skipped, stg_r_inside=segment.stg_r_inside)


def _is_left_out(segment: Segment, block: int) -> bool:
    """Whether stg-r skips the whole block in all rows."""
    skipped = segment.skipped
    if skipped is None or skipped.mode != "stg-r" or segment.stg_r_inside:
        return False
    return block in skipped.blocks
