from __future__ import annotations

from functools import cache
from itertools import combinations, product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.base import ModelFamily, load_class
from stg_trt.models.passes import COND, UNCOND, Pass, row_groups
from stg_trt.models.perturbation import MODES, Perturbation
from stg_trt.models.plan import SegmentRun, StepPlan, full_plan, plan_step, row_counts
from stg_trt.models.segment import TEXT, Segment, cut
from stg_trt.models.workload import Workload
from tests.support.family_cases import CASES, Published
from tests.support.passes import UNCOND_COND, skip_pass

SMALL = Workload(480, 704, 121, text_length=256)
NUM_BLOCKS = 5
BLOCK_SETS = [b for size in range(1, NUM_BLOCKS + 1) for b in combinations(range(NUM_BLOCKS), size)]


def rows(plan: StepPlan) -> dict[str, str]:
    """Segment name to the passes it runs."""
    return {run.segment.name: "+".join(map(str, run.passes)) for run in plan.runs}


def guided(mode: str, blocks: tuple[int, ...]) -> tuple[Pass, ...]:
    """All three passes."""
    return (*UNCOND_COND, skip_pass(mode, blocks))


@pytest.mark.parametrize("skips", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", [(2,), (0, 3), (1, 2, 4)], ids=str)
def test_row_counts_are_those_of_every_plan(mode: str, blocks: tuple[int, ...], skips: int) -> None:
    segments = cut("segmented", NUM_BLOCKS, mode, blocks)
    parts = [
        Perturbation(part_mode, part)
        for part_mode in {mode, "stg-r"}
        for size in range(1, len(blocks) + 1)
        for part in combinations(blocks, size)
    ]
    plans = [
        plan_step(segments, (*plain, *(Pass(f"skip_{i}", part) for i, part in enumerate(several))))
        for plain in ((COND,), UNCOND_COND)
        for count in range(skips + 1)
        for several in product(parts, repeat=count)
    ]
    for segment in segments:
        counts = {len(run.passes) for plan in plans for run in plan.runs if run.segment == segment}
        assert row_counts(segments, segment, Perturbation(mode, blocks), skips) == counts


def test_row_counts_by_hand() -> None:
    front, block, back = cut("segmented", 6, "stg-r", (2,))
    built = Perturbation("stg-r", (2,))
    counts = [row_counts((front, block, back), segment, built) for segment in (front, block, back)]
    # The skip row passes the block by, and is there behind it.
    assert counts == [{1, 2}, {1, 2}, {1, 2, 3}]
    assert row_counts((front, block, back), back, built, skips=3) == {1, 2, 3, 4, 5}
    normal, skipped = cut("twin", 6, "stg-a", (2,))
    built = Perturbation("stg-a", (2,))
    assert row_counts((normal, skipped), normal, built) == {1, 2}
    assert row_counts((normal, skipped), skipped, built) == {1}
    (alone,) = cut("segmented", 6, "stg-a", ())
    assert row_counts((alone,), alone, Perturbation("stg-a", ())) == {1, 2}


def test_stg_r_by_hand() -> None:
    segments = cut("segmented", 6, "stg-r", (2, 4))
    passes = guided("stg-r", (2, 4))
    plan, skip = plan_step(segments, passes), passes[2:]
    front, block_2, mid, block_4, back = segments
    assert plan.passes == passes
    assert plan.runs == (
        SegmentRun(front, UNCOND_COND),
        SegmentRun(block_2, UNCOND_COND, forks=skip, bypassed=skip),
        SegmentRun(mid, passes),
        SegmentRun(block_4, UNCOND_COND, bypassed=skip),
        SegmentRun(back, passes),
    )


def test_stg_a_by_hand() -> None:
    segments = cut("segmented", 6, "stg-a", (0, 1, 5))
    passes = guided("stg-a", (0, 1, 5))
    plan, skip = plan_step(segments, passes), passes[2:]
    front, block_0, block_1, mid, block_5, back = segments
    assert plan.runs == (
        SegmentRun(front, UNCOND_COND),
        SegmentRun(block_0, passes, forks=skip, perturbed=skip),
        SegmentRun(block_1, passes, perturbed=skip),
        SegmentRun(mid, passes),
        SegmentRun(block_5, passes, perturbed=skip),
        SegmentRun(back, passes),
    )


def test_two_skip_passes_by_hand() -> None:
    """The later one joins at its own block; rows are in the order in which passes leave the prefix."""
    segments = cut("segmented", 6, "stg-a", (1, 4))
    late, early = skip_pass("stg-a", (4,), "late"), skip_pass("stg-a", (1,), "early")
    plan = plan_step(segments, (late, COND, UNCOND, early))
    front, block_1, mid, block_4, back = segments
    all_of_them = (UNCOND, COND, early, late)
    assert plan.passes == all_of_them
    assert plan.runs == (
        SegmentRun(front, UNCOND_COND),
        SegmentRun(block_1, all_of_them[:3], forks=(early,), perturbed=(early,)),
        SegmentRun(mid, all_of_them[:3]),
        SegmentRun(block_4, all_of_them, forks=(late,), perturbed=(late,)),
        SegmentRun(back, all_of_them),
    )
    assert [plan.groups(one) for one in ([UNCOND], [early, late], [late])] == [
        range(1),
        range(2, 4),
        range(3, 4),
    ]


def test_a_bypassed_row_between_others_is_computed_and_put_back() -> None:
    segments = cut("segmented", 6, "stg-r", (1, 3))
    twice, once = skip_pass("stg-r", (1, 3), "twice"), skip_pass("stg-r", (1,), "once")
    late = skip_pass("stg-r", (3,), "late")
    plan = plan_step(segments, (COND, twice, once, late))
    front, block_1, mid, block_3, back = segments
    assert plan.runs == (
        SegmentRun(front, (COND,)),
        SegmentRun(block_1, (COND,), forks=(twice, once), bypassed=(twice, once)),
        SegmentRun(mid, (COND, twice, once)),
        SegmentRun(block_3, (COND, twice, once), forks=(late,), bypassed=(twice, late)),
        SegmentRun(back, (COND, twice, once, late)),
    )


def test_without_uncond_groups_begin_at_the_second() -> None:
    assert row_groups((COND, skip_pass())) == range(1, 3)
    assert row_groups(UNCOND_COND) == range(2)


def test_without_cfg_by_hand() -> None:
    segments = cut("segmented", 6, "stg-r", (5,))
    skip = skip_pass("stg-r", (5,))
    plan = plan_step(segments, (COND, skip))
    front, block_5, back = segments
    assert plan.runs == (
        SegmentRun(front, (COND,)),
        SegmentRun(block_5, (COND,), forks=(skip,), bypassed=(skip,)),
        SegmentRun(back, (COND, skip)),
    )


def test_a_step_may_perturb_fewer_blocks_than_were_cut() -> None:
    segments = cut("segmented", 6, "stg-a", (1, 4))
    late = plan_step(segments, guided("stg-a", (4,)))
    plain, every = "uncond+cond", "uncond+cond+skip"
    assert rows(late) == {
        "front": plain,
        "block_1": plain,
        "mid_2_3": plain,
        "block_4": every,
        "back": every,
    }
    skip = late.passes[2:]
    assert [run.forks for run in late.runs] == [run.perturbed for run in late.runs] == [(), (), (), skip, ()]
    early = plan_step(segments, guided("stg-a", (1,)))
    skip = early.passes[2:]
    assert (
        [run.forks for run in early.runs] == [run.perturbed for run in early.runs] == [(), skip, (), (), ()]
    )


def test_stg_r_on_engines_that_were_cut_for_stg_a() -> None:
    segments = cut("segmented", 6, "stg-a", (1,))
    plan = plan_step(segments, guided("stg-r", (1,)))
    skip = plan.passes[2:]
    assert plan.runs[1] == SegmentRun(segments[1], UNCOND_COND, forks=skip, bypassed=skip)


@pytest.mark.parametrize("passes", [(COND,), UNCOND_COND], ids=len)
def test_without_stg_every_segment_runs_the_plain_rows(passes: tuple[Pass, ...]) -> None:
    for blocks in ((), (1, 4)):
        segments = cut("segmented", 6, "stg-a", blocks)
        assert plan_step(segments, passes).runs == tuple(SegmentRun(s, passes) for s in segments)
    normal, _ = cut("twin", 6, "stg-a", (1,))
    assert plan_step(cut("twin", 6, "stg-a", (1,)), passes).runs == (SegmentRun(normal, passes),)


def test_twins_share_nothing() -> None:
    segments = cut("twin", 6, "stg-r", (2,))
    normal, skipped = segments
    passes = guided("stg-r", (2,))
    plan = plan_step(segments, passes)
    assert plan.runs == (SegmentRun(normal, UNCOND_COND), SegmentRun(skipped, passes[2:]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", BLOCK_SETS, ids=str)
def test_skip_rows_fork_once_right_before_the_first_perturbed_block(
    blocks: tuple[int, ...], mode: str
) -> None:
    plan = plan_step(cut("segmented", NUM_BLOCKS, mode, blocks), guided(mode, blocks))
    assert [run.segment.name for run in plan.runs if run.forks] == [f"block_{blocks[0]}"]
    for run in plan.runs:
        inside = not run.segment.front and not run.segment.back and run.segment.start in blocks
        found = (bool(run.bypassed), bool(run.perturbed))
        assert found == (inside and mode == "stg-r", inside and mode == "stg-a")
        before = run.segment.front or run.segment.stop <= blocks[0]
        assert run.passes == (UNCOND_COND if before or run.bypassed else plan.passes)


@pytest.mark.parametrize("mode", MODES)
def test_the_full_plan_carries_the_skip_rows_from_the_start(mode: str) -> None:
    segments = cut("segmented", 6, mode, (2,))
    plan = full_plan(segments, guided(mode, (2,)))
    plain, every = "uncond+cond", "uncond+cond+skip"
    assert rows(plan) == {"front": every, "block_2": plain if mode == "stg-r" else every, "back": every}
    assert not any(run.forks for run in plan.runs)


def test_flops_count_every_row_of_every_run() -> None:
    segments = cut("segmented", 6, "stg-r", (2,))
    plan = plan_step(segments, guided("stg-r", (2,)))
    price = {"front": 100, "block_2": 10, "back": 1}
    assert plan.flops(lambda segment: price[segment.name]) == 2 * 100 + 2 * 10 + 3 * 1


@cache
def family(name: str) -> ModelFamily:
    return Checkpoint.open(name, random_weights=True).family


def flops(
    name: str,
    workload: Workload,
    mode: str,
    blocks: tuple[int, ...],
    plain: tuple[Pass, ...],
    stg: bool = False,
) -> int:
    """Of one step with the shared prefix."""
    segments = cut("segmented", family(name).num_blocks, mode, blocks)
    plan = plan_step(segments, (*plain, skip_pass(mode, blocks)) if stg else plain)
    return plan.flops(lambda segment: family(name).segment_flops(segment, workload))


@pytest.mark.parametrize("known", [known for case in CASES for known in case.published], ids=str)
def test_a_forward_of_the_published_models(known: Published) -> None:
    one = flops(known.name, known.workload, "stg-a", (), (COND,))
    assert one / 1e12 == pytest.approx(known.teraflops, rel=0.005)


def test_the_shared_prefix_of_a_block_early_in_the_model() -> None:
    """21 of 30 blocks follow block 8, for one row more than the two of CFG: 21 / 60."""
    name, workload = "wan2.1-t2v-1.3b", Workload(480, 832, 81, text_length=512)
    cfg = flops(name, workload, "stg-r", (8,), UNCOND_COND)
    stg = flops(name, workload, "stg-r", (8,), UNCOND_COND, stg=True)
    assert stg / cfg - 1 == pytest.approx(21 / 60, abs=0.001)
    assert 1.5 * cfg / stg == pytest.approx(1.11, abs=0.005)


def test_the_shared_prefix_leaves_14_percent_of_stg_r() -> None:
    """8 of 28 blocks follow block 19, for one row more than the two of CFG: 8 / 56."""
    cfg = flops("ltx-video-2b", SMALL, "stg-r", (19,), UNCOND_COND)
    stg = flops("ltx-video-2b", SMALL, "stg-r", (19,), UNCOND_COND, stg=True)
    assert stg / cfg - 1 == pytest.approx(8 / 56, abs=0.001)
    full = 1.5 * cfg
    assert full / stg == pytest.approx(1.31, abs=0.01)


def test_the_keep_input_costs_one_more_row_of_one_block() -> None:
    """Beyond stg-r: V, cross-attention and feed-forward, as any stg-a has; and a row of Q, K and S x S."""
    width, tokens, length = 2048, SMALL_TOKENS, SMALL.text_length
    needed = (
        2 * tokens * 2 * width**2  # V and the output projection
        + 2 * tokens * 2 * width**2 + 2 * length * 2 * width**2 + 4 * tokens * length * width
        + 2 * tokens * 8 * width**2
    )  # fmt: skip
    wasted = 2 * tokens * 2 * width**2 + 4 * tokens**2 * width
    skipped = flops("ltx-video-2b", SMALL, "stg-r", (19,), UNCOND_COND, stg=True)
    kept = flops("ltx-video-2b", SMALL, "stg-a", (19,), UNCOND_COND, stg=True)
    assert kept - skipped == needed + wasted
    cfg = flops("ltx-video-2b", SMALL, "stg-a", (19,), UNCOND_COND)
    assert kept / cfg - 1 == pytest.approx(9 / 56, abs=0.001)


# A first and a last one, one that stg-r skips, and one between.
COUNTED_BLOCKS = 4
SMALL_TOKENS = 16 * 15 * 22
"""(121 - 1) / 8 + 1 latent frames of 480 / 32 by 704 / 32."""


def every_kind(num_blocks: int) -> list[Segment]:
    """Segments of both layouts, with text, embedding and head, and with skipped blocks of both modes."""
    last, middle = num_blocks - 1, num_blocks // 2
    return [
        TEXT,
        *cut("segmented", num_blocks, "stg-a", (0, middle, last)),
        *cut("twin", num_blocks, "stg-a", (middle,)),
        cut("twin", num_blocks, "stg-r", (3, middle))[1],
    ]


@pytest.mark.slow(reason="counts the operations of models of published width")
@pytest.mark.parametrize("known", [case.published[0] for case in CASES], ids=str)
def test_segments_cost_what_torch_counts(known: Published) -> None:
    """Counted at full width, on a few blocks of each kind, without memory for the weights."""
    whole = Checkpoint.open(known.name, random_weights=True)
    published = whole.shortened([COUNTED_BLOCKS] * len(whole.family.block_counts)).family
    with torch.device("meta"):
        model = load_class(published.transformer_class).from_config(published.config)
    for segment in every_kind(published.num_blocks):
        if segment.text and not published.has_text_segment:
            continue
        module = published.module(model, segment, expand_masks=False)
        specs = published.inputs(segment, known.workload)
        inputs = [torch.zeros(spec.with_rows(1), dtype=spec.torch_dtype, device="meta") for spec in specs]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*inputs)
        assert published.segment_flops(segment, known.workload) == counter.get_total_flops(), segment
