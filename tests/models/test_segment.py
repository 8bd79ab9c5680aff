from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from stg_trt.errors import InvalidRequest
from stg_trt.models.perturbation import MODES, Perturbation
from stg_trt.models.segment import LAYOUTS, Segment, cut, engine_outputs

NUM_BLOCKS = 6
BLOCK_SETS = [blocks for size in range(NUM_BLOCKS + 1) for blocks in combinations(range(NUM_BLOCKS), size)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", BLOCK_SETS, ids=str)
def test_every_block_is_in_one_segment_and_perturbable_ones_stand_alone(
    blocks: tuple[int, ...], mode: str
) -> None:
    segments = cut("segmented", NUM_BLOCKS, mode, blocks)
    assert [block for segment in segments for block in segment.blocks] == list(range(NUM_BLOCKS))
    assert [segment.front for segment in segments] == [True, *[False] * (len(segments) - 1)]
    assert [segment.back for segment in segments] == [*[False] * (len(segments) - 1), True]
    assert len({segment.name for segment in segments}) == len(segments)
    alone = [s for s in segments if not s.front and not s.back and s.start in blocks]
    assert [tuple(segment.blocks) for segment in alone] == [(block,) for block in blocks]
    assert [s for s in segments if s.keep_input] == (alone if mode == "stg-a" else [])
    assert all(left.stop == right.start for left, right in pairwise(segments))
    assert not any(segment.skipped for segment in segments)


def test_no_segment_is_cut_without_need() -> None:
    inner = [s for s in cut("segmented", NUM_BLOCKS, "stg-r", (1, 2, 4)) if not s.front and not s.back]
    assert inner == [
        Segment("block_1", 1, 2),
        Segment("block_2", 2, 3),
        Segment("mid_3_3", 3, 4),
        Segment("block_4", 4, 5),
    ]


@pytest.mark.parametrize(
    ("blocks", "runs"),
    [
        ((), [("normal", 0, 6)]),
        ((0,), [("front", 0, 0), ("block_0", 0, 1), ("back", 1, 6)]),
        ((5,), [("front", 0, 5), ("block_5", 5, 6), ("back", 6, 6)]),
        ((3, 1), [("front", 0, 1), ("block_1", 1, 2), ("mid_2_2", 2, 3), ("block_3", 3, 4), ("back", 4, 6)]),
    ],
)
def test_segments_in_the_order_they_run(blocks: tuple[int, ...], runs: list[tuple[str, int, int]]) -> None:
    segments = cut("segmented", NUM_BLOCKS, "stg-a", blocks)
    assert [(segment.name, segment.start, segment.stop) for segment in segments] == runs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", BLOCK_SETS, ids=str)
def test_twins_are_two_whole_models(blocks: tuple[int, ...], mode: str) -> None:
    normal, *others = cut("twin", NUM_BLOCKS, mode, blocks)
    assert normal == Segment("normal", 0, NUM_BLOCKS, front=True, back=True)
    skipped = Segment("skipped", 0, NUM_BLOCKS, True, True, skipped=Perturbation(mode, blocks))
    assert others == ([skipped] if blocks else [])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("mode", "blocks", "message"),
    [
        ("stg-a", (6,), r"stg_blocks: expected block numbers from 0 to 5, got \[6\]: name blocks that"),
        ("stg-r", (2, -1), r"stg_blocks: expected block numbers from 0 to 5, got \[-1\]"),
        ("stg-a", (2, 2), r"stg_blocks: expected distinct block numbers, got \[2, 2\]: drop repeats"),
        ("stg-b", (2,), "stg_mode: expected one of stg-a, stg-r, got 'stg-b': choose one of them"),
    ],
)
def test_cuts_that_cannot_be(layout: str, mode: str, blocks: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        cut(layout, NUM_BLOCKS, mode, blocks)


def test_a_tensor_that_is_read_and_written_has_two_names() -> None:
    names = engine_outputs(("hidden_states", "temb"), ("hidden_states", "pred"))
    assert names == ("next_hidden_states", "pred")
