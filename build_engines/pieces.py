"""The pieces that a segment is exported as: most blocks of a model differ in their weights' values alone."""

from __future__ import annotations

from dataclasses import replace

from stg_trt.models.perturbation import Perturbation
from stg_trt.models.segment import Segment


def pieces_of(segment: Segment) -> tuple[Segment, ...]:
    """Embedding, blocks one by one, head; a block that is skipped in all rows is no piece."""
    blocks = []
    for block in segment.blocks:
        piece = Segment("block", block, block + 1, keep_input=segment.keep_input, expert=segment.expert)
        if segment.skipped is not None and block in segment.skipped.blocks:
            if segment.skipped.mode == "stg-r":
                continue
            piece = replace(piece, skipped=Perturbation(segment.skipped.mode, (block,)))
        blocks.append(piece)
    if not blocks:
        return (segment,)
    embedding = Segment("embedding", segment.start, segment.start, front=True, expert=segment.expert)
    head = Segment("head", segment.stop, segment.stop, back=True, expert=segment.expert)
    return (*([embedding] if segment.front else []), *blocks, *([head] if segment.back else []))
