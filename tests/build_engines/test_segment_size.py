"""Long runs of blocks become several engines, which compute the same."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from stg_trt import VideoPipeline, build
from stg_trt.build_engines.segment_size import fitting_bytes, split
from stg_trt.engines.store import EngineStore
from stg_trt.errors import InvalidRequest
from stg_trt.models.passes import COND, UNCOND
from stg_trt.models.plan import plan_step
from stg_trt.models.segment import Segment, cut
from stg_trt.system import machine_memory
from stg_trt.system.units import GIB
from tests.support.family_cases import CASES, LTX, FamilyCase
from tests.support.golden_calls import arguments, every_step
from tests.support.passes import skip_pass
from tests.support.tiny_svd import SVD

Machine = namedtuple("Machine", "total available")
Swap = namedtuple("Swap", "free")
EVEN: dict[int | None, int] = dict.fromkeys(range(40), 10)


def names(segments: tuple[Segment, ...]) -> list[str]:
    return [segment.name for segment in segments]


def test_runs_of_blocks_are_split_into_about_equal_parts() -> None:
    segments = cut("segmented", 40, "stg-a", (20, 33))
    found = split(segments, EVEN, 90)
    assert names(found) == [
        *("front_0_6", "front_7_13", "front_14_19", "block_20", "mid_21_26", "mid_27_32", "block_33"),
        "back",
    ]
    assert [(s.front, s.back) for s in found] == [(True, False), *[(False, False)] * 6, (False, True)]
    assert [block for segment in found for block in segment.blocks] == [*range(40)]
    assert split(segments, EVEN, 200) == segments


def test_the_last_part_has_the_head() -> None:
    (front, *_, back) = split(cut("segmented", 40, "stg-a", ()), EVEN, 50)
    assert (front.name, front.front, front.back) == ("normal_0_4", True, False)
    assert (back.name, back.front, back.back) == ("normal_35_39", False, True)


def test_blocks_of_different_sizes_keep_the_limit() -> None:
    sizes: dict[int | None, int] = {**dict.fromkeys(range(20), 30), **dict.fromkeys(range(20, 60), 13)}
    for limit in (30, 31, 59, 60, 100, 400):
        parts = split(cut("segmented", 60, "stg-a", ()), sizes, limit)
        assert [block for part in parts for block in part.blocks] == [*range(60)]
        assert all(sum(sizes[block] for block in part.blocks) <= limit for part in parts)
        assert len(parts) <= 2 * -(-sum(sizes.values()) // limit)


def test_a_block_that_is_larger_is_a_part_of_its_own() -> None:
    parts = split((Segment("front", 0, 3, front=True),), {0: 5, 1: 50, 2: 5}, 20)
    assert [[*part.blocks] for part in parts] == [[0], [1], [2]]


def test_a_step_runs_as_much_as_without_the_split() -> None:
    passes = (UNCOND, COND, skip_pass("stg-a", (20,)))
    plans = [
        plan_step(segments, passes)
        for segments in (
            cut("segmented", 40, "stg-a", (20,)),
            split(cut("segmented", 40, "stg-a", (20,)), EVEN, 50),
        )
    ]
    flops = [plan.flops(lambda segment: len(segment.blocks)) for plan in plans]
    assert flops[0] == flops[1] == 2 * 20 + 3 * 20
    assert len(plans[1].runs) == 9


@pytest.mark.parametrize("case", CASES, ids=str)
def test_engines_of_single_blocks_make_the_same_video(
    golden_engines: Callable[[FamilyCase], Path], case: FamilyCase, tmp_path: Path
) -> None:
    golden = case.golden_names[-1]
    shared: dict[str, Any] = {
        **case.sizes,
        "max_batch": 2,
        "stg_blocks": case.cut_at[-1:],
        "stg_mode": "stg-a",
    }
    build(case.goldens, tmp_path, **shared, verify_timesteps=0, max_segment_gib=largest_block(case) / GIB)
    (made,) = EngineStore.open(tmp_path).builds
    segments = [record.segment for record in made.manifest.segments]
    assert [block for segment in segments for block in segment.blocks] == [*range(case.family.num_blocks)]
    whole = VideoPipeline.from_pretrained(case.goldens, golden_engines(case), layout="segmented")
    parts = VideoPipeline.from_pretrained(case.goldens, tmp_path)
    skipped = {"stg_scale": 1.0, "stg_mode": "stg-a", "stg_blocks": case.cut_at[-1:]}
    expected, got = (every_step(one, **arguments(golden, case.goldens) | skipped) for one in (whole, parts))
    assert len(segments) > len(cut("segmented", case.family.num_blocks, "stg-a", case.cut_at[-1:]))
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp_min(1)


def largest_block(case: FamilyCase) -> int:
    """Bytes of weights."""
    sizes: dict[int | None, int] = {}
    for name, weight in case.checkpoint.load_transformer().state_dict().items():
        block = case.family.block_of(name)
        sizes[block] = sizes.get(block, 0) + 4 * weight.numel()
    return max(size for block, size in sizes.items() if block is not None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_segment_gib": 0}, "max_segment_gib: expected a number above 0, got 0: such as 4"),
        ({"max_segment_gib": float("nan")}, "max_segment_gib: expected a number above 0, got nan"),
        (
            {"max_segment_gib": 1e-9},
            "max_segment_gib: expected at least 6.38e-05, the weights of the largest b",
        ),
        (
            {"max_segment_gib": 4, "layout": "twin"},
            "max_segment_gib: expected a transformer in the segmented layout, got ltx-video in the twin",
        ),
    ],
)
def test_limits_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        build(LTX.goldens, tmp_path / "engines", **LTX.sizes, stg_blocks=[1], **options)
    assert str(refused.value).startswith(message) and not [*tmp_path.iterdir()]


def test_a_unet_is_not_split(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 4}
    with pytest.raises(InvalidRequest, match="in the segmented layout, got svd in the segmented layout"):
        build(SVD, tmp_path, **sizes, stg_blocks={"spatial": [0]}, max_segment_gib=4)


@pytest.mark.parametrize(
    ("files", "total"),
    [
        ({}, 64 * GIB),
        ({"memory.max": "max", "memory.current": "5"}, 64 * GIB),
        ({"memory.max": str(24 * GIB), "memory.current": str(20 * GIB)}, 24 * GIB),
        (
            {"memory/memory.limit_in_bytes": str(24 * GIB), "memory/memory.usage_in_bytes": str(20 * GIB)},
            24 * GIB,
        ),
        ({"memory/memory.limit_in_bytes": str(1 << 62), "memory/memory.usage_in_bytes": "7"}, 64 * GIB),
    ],
)
def test_a_container_may_have_less_than_its_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], total: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(machine_memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Machine(total=64 * GIB, available=60 * GIB))
    monkeypatch.setattr(psutil, "swap_memory", lambda: Swap(free=GIB))
    assert machine_memory.total_bytes() == total
    assert machine_memory.available_bytes() == (61 * GIB if total == 64 * GIB else 4 * GIB)
    assert GIB <= fitting_bytes() < total
