"""Which rank computes which passes, and the FLOPs of the busiest."""

from __future__ import annotations

from itertools import combinations

import pytest

from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.passes import COND, ISOLATION, UNCOND, Pass
from stg_trt.models.plan import plan_step
from stg_trt.models.ranks import check_ranks, split_passes
from stg_trt.models.segment import LAYOUTS, Segment, cut
from tests.support.family_cases import CASES, Published
from tests.support.pages import table
from tests.support.passes import UNCOND_COND, skip_pass

PUBLISHED = {known.name: known for case in CASES for known in case.published}


def one_each(segment: Segment) -> int:
    return len(segment.blocks)


def names(parts: tuple[tuple[Pass, ...], ...]) -> list[str]:
    return ["+".join(map(str, part)) for part in parts]


def flops_of(known: Published, ranks: int) -> float:
    """Of the busiest of the ranks, in forwards of one row."""
    family = Checkpoint.open(known.name, random_weights=True).family
    mode, blocks = family.defaults.stg_mode, family.defaults.stg_blocks
    assert isinstance(blocks, tuple)
    segments = cut("segmented", family.num_blocks, mode, blocks)
    plain = UNCOND_COND if family.embedded_guidance is None else (COND,)
    passes = (*plain, skip_pass(mode, blocks))

    def per_row(segment: Segment) -> int:
        return family.segment_flops(segment, known.workload)

    parts = split_passes(segments, passes, ranks, per_row)
    whole = plan_step(segments, (COND,)).flops(per_row)
    return max(plan_step(segments, passes, 0, part).flops(per_row) for part in parts) / whole


@pytest.mark.parametrize("row", table("docs/guidance.md", "model | passes"), ids=lambda row: row["model"])
def test_the_table_of_the_documentation(row: dict[str, str]) -> None:
    known = PUBLISHED[row["model"]]
    for ranks, column in ((1, "one GPU"), (2, "two GPUs"), (3, "three GPUs")):
        assert f"{flops_of(known, ranks):.2f}" == row[column], column


def test_the_skip_pass_stays_with_cond_where_that_is_cheaper() -> None:
    late, early = (cut("segmented", 10, "stg-a", (block,)) for block in (8, 1))
    for segments, block in ((late, 8), (early, 1)):
        parts = split_passes(segments, (*UNCOND_COND, skip_pass("stg-a", (block,))), 2, one_each)
        assert names(parts) == ["uncond", "cond+skip"]
    guided = (COND, skip_pass("stg-a", (8,)))
    assert names(split_passes(late, guided, 2, one_each)) == ["cond", "skip"]
    assert names(split_passes(late, (COND,), 2, one_each)) == ["", "cond"]


def test_isolation_goes_with_uncond() -> None:
    segments = cut("segmented", 10, "stg-a", (5,))
    passes = (UNCOND, ISOLATION, COND, skip_pass("stg-a", (5,)))
    assert names(split_passes(segments, passes, 2, one_each)) == ["uncond+isolation", "cond+skip"]
    assert names(split_passes(segments, passes, 3, one_each)) == ["uncond", "isolation", "cond+skip"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["stg-a", "stg-r"])
def test_every_pass_is_computed_once(layout: str, mode: str) -> None:
    segments = cut(layout, 6, mode, (2, 4))
    skips = [skip_pass(mode, (2, 4)), Pass("late", skip_pass(mode, (4,)).perturbation)]
    every = (UNCOND, COND, *skips[: 1 if layout == "twin" else 2])
    for count in range(len(every)):
        for chosen in combinations(every, count + 1):
            for ranks in (1, 2, 3):
                parts = split_passes(segments, chosen, ranks, one_each)
                assert len(parts) == ranks and sorted(map(str, sum(parts, ()))) == sorted(map(str, chosen))


def test_a_skip_pass_without_cond_is_computed_from_its_start() -> None:
    segments = cut("segmented", 6, "stg-a", (2,))
    skip = skip_pass("stg-a", (2,))
    plan = plan_step(segments, (*UNCOND_COND, skip), computed=(skip,))
    assert [run.passes for run in plan.runs] == [(skip,)] * 3
    assert [run.perturbed for run in plan.runs] == [(), (skip,), ()] and not any(
        run.forks for run in plan.runs
    )
    # Its rows are where they are beside the other passes.
    assert plan.groups(plan.computed) == range(2, 3)


def test_a_block_that_the_only_pass_leaves_out_does_not_run() -> None:
    segments = cut("segmented", 6, "stg-r", (2,))
    skip = skip_pass("stg-r", (2,))
    plan = plan_step(segments, (*UNCOND_COND, skip), computed=(skip,))
    assert [run.segment.name for run in plan.runs] == ["front", "back"]


@pytest.mark.parametrize("ranks", [0, 6, 2.0, True])
def test_numbers_of_ranks_that_no_step_uses(ranks: int) -> None:
    with pytest.raises(InvalidRequest, match="guidance_parallel: expected a number of GPUs from 1 to 5, got"):
        check_ranks(ranks)
