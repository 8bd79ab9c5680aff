"""Where a model is cut: a segment is a run of blocks that becomes one engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from stg_trt.errors import InvalidRequest
from stg_trt.models.perturbation import Perturbation, check_blocks, check_mode

Layout = Literal["segmented", "twin"]
LAYOUTS: tuple[Layout, ...] = ("segmented", "twin")


@dataclass(frozen=True)
class Segment:
    """Blocks [start, stop) of a model, with the embedding if `front` and the head if `back`.

    `text` is the projection of the prompt, run once per call. `skipped` blocks are perturbed for all rows
    (the twin layout); `keep_input` adds a bool per row that switches self-attention (segmented stg-a).
    With `stg_r_inside`, stg-r does not leave out the blocks but changes them, by a bool per row too. What was
    made before the block `indexed_before` keeps its rows, and is read by an index instead of being copied.
    `expert` numbers the transformers of a checkpoint, of which one predicts at each step.
    """

    name: str
    start: int = 0
    stop: int = 0
    front: bool = False
    back: bool = False
    text: bool = False
    keep_input: bool = False
    skipped: Perturbation | None = None
    # What is printed of the others stays as it was.
    stg_r_inside: bool = field(default=False, repr=False)
    indexed_before: int | None = field(default=None, repr=False)
    expert: int = field(default=0, repr=False)

    @property
    def blocks(self) -> range:
        """The block numbers."""
        return range(self.start, self.stop)

    @property
    def has_ends(self) -> bool:
        """Whether it reads weights that belong to no block."""
        return self.front or self.back or self.text

    def part(self, start: int, stop: int) -> Segment:
        """Some of its blocks; the first part has its embedding, the last one its head."""
        name = f"{self.name.partition('_')[0]}_{start}_{stop - 1}"
        front, back = self.front and start == self.start, self.back and stop == self.stop
        return replace(self, name=name, start=start, stop=stop, front=front, back=back)

    def of_expert(self, expert: int) -> Segment:
        """The same segment of another transformer, named after its folder in the checkpoint."""
        return replace(self, name=f"transformer_{expert + 1}_{self.name}", expert=expert) if expert else self


TEXT = Segment("text", text=True)


def check_layout(layout: str) -> None:
    """Raises InvalidRequest unless `layout` is segmented or twin."""
    if layout not in LAYOUTS:
        raise InvalidRequest(
            f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}: choose one of them"
        )


def blocks_of_expert(segments: Sequence[Segment], expert: int) -> tuple[Segment, ...]:
    """What a step of an expert runs: its segments, except that of the text."""
    return tuple(segment for segment in segments if segment.expert == expert and not segment.text)


def engine_outputs(inputs: tuple[str, ...], outputs: tuple[str, ...]) -> tuple[str, ...]:
    """Output names inside an engine, where a tensor that is read and written needs two names."""
    return tuple(f"next_{name}" if name in inputs else name for name in outputs)


def cut(layout: str, num_blocks: int, mode: str, blocks: tuple[int, ...]) -> tuple[Segment, ...]:
    """The segments of a layout, in the order they run; raises InvalidRequest for blocks out of range."""
    check_mode(mode)
    check_blocks(blocks, num_blocks)
    return (
        _segmented(num_blocks, mode, tuple(sorted(blocks)))
        if layout == "segmented"
        else _twin(num_blocks, Perturbation(mode, blocks))
    )


def _segmented(num_blocks: int, mode: str, blocks: tuple[int, ...]) -> tuple[Segment, ...]:
    """front | block | mid | block | back, with a cut on both sides of every perturbable block."""
    if not blocks:
        return (Segment("normal", 0, num_blocks, front=True, back=True),)
    segments = [Segment("front", 0, blocks[0], front=True)]
    for block, following in zip(blocks, (*blocks[1:], None), strict=True):
        segments.append(Segment(f"block_{block}", block, block + 1, keep_input=mode == "stg-a"))
        if following is None:
            segments.append(Segment("back", block + 1, num_blocks, back=True))
        elif following > block + 1:
            segments.append(Segment(f"mid_{block + 1}_{following - 1}", block + 1, following))
    return tuple(segments)


def _twin(num_blocks: int, perturbation: Perturbation) -> tuple[Segment, ...]:
    """Two complete engines, normal and skipped."""
    whole = Segment("normal", 0, num_blocks, front=True, back=True)
    if not perturbation.blocks:
        return (whole,)
    return (whole, Segment("skipped", 0, num_blocks, front=True, back=True, skipped=perturbation))
