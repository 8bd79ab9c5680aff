from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.guidance.bins import TimestepBins
from stg_trt.guidance.combine import combine
from stg_trt.guidance.options import GuidanceOptions
from stg_trt.guidance.presets import load_preset
from stg_trt.guidance.resolved import OFF
from stg_trt.guidance.skips import SkipSchedule
from stg_trt.guidance.tables import Guidance, dynamic_cfg
from stg_trt.models.passes import COND, UNCOND
from stg_trt.models.perturbation import Perturbation
from tests.support.passes import skip_pass

FIRST, SECOND = "ltx-video-13b-0.9.8-dev", "ltx-video-13b-0.9.8-dev-second-pass"
SIGMAS = [1.0, 0.75, 0.5, 0.25]


def preds(batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """cond, uncond, skip; every video with its own mean and scale."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.arange(1, batch + 1).reshape(-1, 1, 1, 1, 1)
    cond, uncond, skip = (
        torch.randn(batch, 4, 3, 6, 8, generator=generator) * scale + scale for _ in range(3)
    )
    return cond.to(dtype), uncond.to(dtype), skip.to(dtype)


def tables(sigmas: list[float], **options: Any) -> Guidance:
    """As the pipeline makes them, without a family's defaults."""
    return Guidance.for_steps(sigmas, GuidanceOptions(**options).resolve(OFF))


def reference(cond: Tensor, uncond: Tensor | None, skip: Tensor | None, **scales: Any) -> Tensor:
    """The equations of one video after the other, in float64."""
    videos = []
    for i in range(len(cond)):
        c = cond[i].double()
        pred = c
        if uncond is not None:
            u = uncond[i].double()
            if scales.get("cfg_zero_star"):
                u = u * (c * u).sum() / (u.pow(2).sum() + 1e-8)
            pred = u + scales["cfg_scale"] * (c - u)
        if skip is not None:
            pred = pred + scales["stg_scale"] * (c - skip[i].double())
        rescale = scales.get("rescale", 0.0)
        videos.append(pred * (rescale * c.std() / pred.std() + (1 - rescale)))
    return torch.stack(videos)


def combined(
    cond: Tensor,
    uncond: Tensor | None = None,
    skip: Tensor | None = None,
    *,
    cfg_scale: float = 1.0,
    stg_scale: float = 0.0,
    rescale: float = 0.0,
    cfg_zero_star: bool = False,
) -> Tensor:
    """The weighted sum of the passes that are given, of one number each."""
    given = [(uncond, 1 - cfg_scale), (cond, cfg_scale + stg_scale), (skip, -stg_scale)]
    rows = [(pred, weight) for pred, weight in given if pred is not None]
    return combine(
        torch.stack([pred for pred, _ in rows]),
        torch.tensor([weight for _, weight in rows]),
        cond=0 if uncond is None else 1,
        rescale=rescale,
        zero_star=0 if cfg_zero_star and uncond is not None else None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cfg_zero_star", [False, True])
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("cfg", "stg"), [(3.0, 1.0), (3.0, None), (None, 1.0), (0.0, 2.0), (6.0, 4.0)])
def test_combine_is_the_equation(
    cfg: float | None, stg: float | None, rescale: float, cfg_zero_star: bool, dtype: torch.dtype
) -> None:
    cond, uncond, skip = preds(dtype=dtype)
    scales: dict[str, Any] = {"rescale": rescale, "cfg_zero_star": cfg_zero_star}
    scales |= {} if cfg is None else {"cfg_scale": cfg}
    scales |= {} if stg is None else {"stg_scale": stg}
    rows = (cond, None if cfg is None else uncond, None if stg is None else skip)
    pred = combined(*rows, **scales)
    assert pred.dtype == torch.float32
    torch.testing.assert_close(pred, reference(*rows, **scales).float(), rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("frames", [1, 4])
def test_any_number_of_passes_is_their_weighted_sum(count: int, frames: int) -> None:
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, 2, 4, 3, generator=generator)
    weights = torch.randn(count, frames, generator=generator)
    cond = min(1, count - 1)
    weights[cond] += 1 - weights.sum(0)
    expected = (rows.double() * weights[:, None, :, None].double()).sum(0)
    given = weights.clone()
    given[cond] = math.nan
    torch.testing.assert_close(combine(rows, given, cond).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cfg_zero_star", [False, True])
def test_a_batch_is_its_videos_one_by_one(cfg_zero_star: bool) -> None:
    rows = preds(batch=2)
    scales: dict[str, Any] = {
        "cfg_scale": 5.0,
        "stg_scale": 2.0,
        "rescale": 0.7,
        "cfg_zero_star": cfg_zero_star,
    }
    both = combined(*rows, **scales)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], combined(*(row[i : i + 1] for row in rows), **scales))


def test_equal_predictions_are_kept_exactly() -> None:
    cond, _, _ = preds()
    assert torch.equal(combined(cond), cond)
    assert torch.equal(combined(cond, cond, cond, cfg_scale=7.5, stg_scale=3.0), cond)


def test_the_stg_scale_means_the_same_with_and_without_cfg() -> None:
    cond, uncond, skip = preds()
    push = combined(cond, None, skip, stg_scale=2.0) - combined(cond)
    pushed = combined(cond, uncond, skip, cfg_scale=6.0, stg_scale=2.0)
    torch.testing.assert_close(pushed - combined(cond, uncond, cfg_scale=6.0), push, rtol=1e-5, atol=1e-4)


def test_full_rescale_restores_each_videos_own_spread() -> None:
    cond, uncond, skip = preds(batch=3)
    pred = combined(cond, uncond, skip, cfg_scale=8.0, stg_scale=4.0, rescale=1.0)
    torch.testing.assert_close(pred.flatten(1).std(dim=1), cond.flatten(1).std(dim=1))


def test_half_precision_is_combined_in_float32() -> None:
    cond, uncond, skip = preds(dtype=torch.float16)
    huge = combined(cond * 2000, uncond * -2000, skip * 2000, cfg_scale=8.0, stg_scale=4.0, rescale=0.7)
    assert huge.isfinite().all() and huge.abs().max() > torch.finfo(torch.float16).max


def test_combine_leaves_its_inputs() -> None:
    rows = torch.stack(preds())
    kept = rows.clone()
    combine(rows, torch.tensor([4.0, -2.0, -1.0]), cond=0, rescale=0.7, zero_star=1)
    assert torch.equal(rows, kept)


def test_everything_is_off_by_default() -> None:
    guidance = Guidance.for_steps(SIGMAS)
    assert guidance == Guidance((1.0,) * 4, (0.0,) * 4)
    assert [guidance.passes(i) for i in range(4)] == [(COND,)] * 4
    assert [guidance.weights(i) for i in range(4)] == [(1.0,)] * 4
    assert guidance.perturbations == frozenset() and guidance.most_skips == 0


def test_scalars_and_lists_become_tables() -> None:
    guidance = tables(
        SIGMAS,
        guidance_scale=[1, 3, 3, 1],
        stg_scale=1,
        rescale=0.7,
        stg_mode="stg-r",
        stg_blocks=[19, 20],
    )
    assert guidance.cfg_scale == (1.0, 3.0, 3.0, 1.0)
    assert guidance.rescale == (0.7,) * 4
    assert guidance.skips == (SkipSchedule((1.0,) * 4, ((19, 20),) * 4, "stg-r"),)
    skip = skip_pass("stg-r", (19, 20))
    assert guidance.passes(0) == (COND, skip) and guidance.passes(1) == (UNCOND, COND, skip)
    assert guidance.weights(0) == (2.0, -1.0) and guidance.weights(1) == (-2.0, 4.0, -1.0)
    assert guidance.perturbations == {Perturbation("stg-r", (19, 20))}
    assert hash(guidance) == hash(dataclasses.replace(guidance))


def test_stg_runs_only_inside_its_range() -> None:
    guidance = tables(SIGMAS, guidance_scale=3.0, stg_scale=1.0, stg_blocks=[2], stg_range=(0, 2))
    assert guidance.skips[0].scale == (1.0, 1.0, 0.0, 0.0)
    assert guidance.passes(0) == (UNCOND, COND, skip_pass("stg-a", (2,)))
    assert guidance.passes(2) == (UNCOND, COND)


def test_blocks_per_step_and_in_bins() -> None:
    listed = tables(SIGMAS, stg_scale=[0, 1, 1, 1], stg_blocks=[[], [1], [1, 2], [3]])
    assert listed.skips[0].blocks == ((), (1,), (1, 2), (3,))
    binned = tables(SIGMAS, stg_scale=1.0, stg_blocks=TimestepBins((0.6, 0.3), ((7,), (8, 9))))
    assert binned.skips[0].blocks == ((7,), (7,), (8, 9), (8, 9))


@pytest.mark.parametrize(
    ("sigma", "value"),
    [(1.0, "a"), (0.996, "b"), (0.9959, "c"), (0.9961, "b"), (0.5, "c"), (0.4999, "c"), (0.0, "c")],
)
def test_a_step_takes_the_first_bin_at_or_below_it_else_the_last(sigma: float, value: str) -> None:
    assert TimestepBins((1.0, 0.996, 0.5), ("a", "b", "c")).at(sigma) == value


def test_a_float32_sigma_on_an_edge_reaches_its_bin() -> None:
    edges = (1.0, 0.9933, 0.985, 0.9767, 0.9008, 0.618)
    bins = TimestepBins(edges, tuple(range(6)))
    assert [bins.at(float(torch.tensor(edge, dtype=torch.float32))) for edge in edges] == list(range(6))


@pytest.mark.parametrize(
    ("sigma", "cfg", "stg", "rescale", "blocks"),
    [
        (1.0, 1, 0, 0, ()),
        (0.996, 1, 0, 0, (11, 25, 35, 39)),
        (0.9933, 6, 4, 0.5, (22, 35, 39)),
        (0.985, 8, 4, 0.5, (28,)),
        (0.9767, 6, 4, 0, (28,)),
        (0.95, 1, 2, 0, (28,)),
        (0.9008, 1, 2, 0, (28,)),
        (0.618, 1, 1, 0, (28,)),
        (0.1, 1, 1, 0, (28,)),
    ],
)
def test_first_pass_preset(
    sigma: float, cfg: float, stg: float, rescale: float, blocks: tuple[int, ...]
) -> None:
    guidance = tables([sigma], preset=FIRST)
    skips = (SkipSchedule((stg,), (blocks,)),) if stg else ()
    assert guidance == Guidance((cfg,), (rescale,), skips, cfg_zero_star=True)


def test_preset_computes_only_the_passes_it_weighs() -> None:
    guidance = tables([1.0, 0.9965, 0.99, 0.95], preset=FIRST)
    assert ["+".join(map(str, guidance.passes(i))) for i in range(4)] == [
        "cond",
        "cond",
        "uncond+cond+skip",
        "cond+skip",
    ]


def test_presets_say_which_steps_to_run() -> None:
    first, second = load_preset(FIRST), load_preset(SECOND)
    assert (first.num_inference_steps, first.drop_first, first.drop_last) == (30, 0, 3)
    assert (second.num_inference_steps, second.drop_first, second.drop_last) == (30, 17, 0)
    guidance = tables([0.9, 0.2], preset=SECOND)
    skips = (SkipSchedule((1.0, 1.0), ((27,), (27,))),)
    assert guidance == Guidance((1.0, 1.0), (0.0, 0.0), skips, cfg_zero_star=True)


def test_an_argument_replaces_the_presets_table() -> None:
    guidance = tables([0.99, 0.95], preset=FIRST, stg_scale=0.0, cfg_zero_star=False)
    assert guidance.skips == () and not guidance.cfg_zero_star
    assert guidance.cfg_scale == (8.0, 1.0) and guidance.rescale == (0.5, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": [3.0, 3.0]}, "guidance_scale: expected 4 entries, one per step, got 2"),
        ({"rescale": []}, "rescale: expected 4 entries, one per step, got 0"),
        ({"stg_scale": 1.0, "stg_blocks": [[1], [2]]}, "stg_blocks: expected 4 entries, one per step, got 2"),
        ({"guidance_scale": math.nan}, "guidance_scale: expected a number that is finite, got nan at step 0"),
        ({"guidance_scale": [1, 1, math.inf, 1]}, "guidance_scale: .* got inf at step 2"),
        ({"stg_scale": -1.0, "stg_blocks": [1]}, "stg_scale: expected a number from 0 to inf, got -1.0"),
        ({"stg_scale": math.inf, "stg_blocks": [1]}, "stg_scale: .* got inf"),
        ({"rescale": 1.5}, "rescale: expected a number from 0 to 1, got 1.5"),
        ({"rescale": -0.1}, "rescale: expected a number from 0 to 1, got -0.1"),
        ({"stg_scale": 1.0}, "stg_blocks: expected blocks for stg_scale 1.0 at step 0, got none"),
        ({"stg_scale": 1.0, "stg_blocks": [-1]}, "stg_blocks: expected block numbers from 0"),
        ({"stg_scale": 1.0, "stg_blocks": [1, [2]]}, "stg_blocks: .* do not mix them"),
        ({"stg_mode": "stg-x"}, "stg_mode: expected one of stg-a, stg-r, got 'stg-x': choose one of them"),
        (
            {"stg_scale": 1.0, "stg_blocks": [1], "stg_range": (2, 1)},
            "stg_range: expected 0 <= start < stop <= 4",
        ),
        (
            {"stg_scale": 1.0, "stg_blocks": [1], "stg_range": (0, 5)},
            "stg_range: expected 0 <= start < stop <= 4",
        ),
        ({"preset": "ltx"}, f"preset: expected one of .*, {FIRST}, {SECOND}, got 'ltx'"),
    ],
)
def test_refuses_with_expected_got_and_fix(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        tables(SIGMAS, **arguments)


def test_bins_refuse_raw_timesteps() -> None:
    with pytest.raises(InvalidRequest, match=r"bins expected sigmas in 0..1, got 999.0 at step 0: divide"):
        tables([999.0, 500.0], preset=FIRST)


@pytest.mark.parametrize(
    ("edges", "values", "message"),
    [
        ((), (), "one value per edge"),
        ((1.0, 0.5), (1.0,), "got 1 for 2 edges"),
        ((0.5, 1.0), (1.0, 2.0), "falling edges"),
        ((0.5, 0.5), (1.0, 2.0), "falling edges"),
        ((1000.0, 1.0), (1.0, 2.0), "edges in 0..1"),
        ((math.nan,), (1.0,), "edges in 0..1"),
    ],
)
def test_bins_are_checked(edges: tuple[float, ...], values: tuple[float, ...], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        TimestepBins(edges, values)


def test_tables_given_directly_are_checked() -> None:
    with pytest.raises(InvalidRequest, match="rescale: expected 2 entries, one per step, got 1"):
        Guidance((1.0, 1.0), (0.0,))
    with pytest.raises(InvalidRequest, match="stg_scale: expected 2 entries, one per step, got 1"):
        Guidance((1.0, 1.0), (0.0, 0.0), (SkipSchedule((1.0,), ((1,),)),))
    with pytest.raises(InvalidRequest, match="blocks: expected 2 entries, one per step, got 1"):
        SkipSchedule((1.0, 1.0), ((1,),))


TWO = {"spatial": [14], "temporal": [15]}


def test_several_skip_passes_have_names() -> None:
    guidance = tables(
        SIGMAS, guidance_scale=3.0, stg_scale={"spatial": 1.0, "temporal": [0, 2, 2, 0]}, stg_blocks=TWO
    )
    spatial, temporal = skip_pass(blocks=(14,), name="spatial"), skip_pass(blocks=(15,), name="temporal")
    assert guidance.passes(0) == (UNCOND, COND, spatial)
    assert guidance.passes(1) == (UNCOND, COND, spatial, temporal)
    assert guidance.weights(0) == (-2.0, 4.0, -1.0) and guidance.weights(1) == (-2.0, 6.0, -1.0, -2.0)
    assert guidance.most_skips == 2
    assert guidance.perturbations == {Perturbation("stg-a", (14,)), Perturbation("stg-a", (15,))}


def test_one_scale_is_that_of_every_skip_pass() -> None:
    assert tables(SIGMAS, stg_scale=0.5, stg_blocks=TWO).weights(3) == (2.0, -0.5, -0.5)


def test_rows_are_in_the_order_in_which_passes_leave_the_prefix() -> None:
    guidance = tables(
        SIGMAS, stg_scale={"a": 1.0, "b": 2.0}, stg_blocks={"a": [[5], [5], [1], [1]], "b": [3]}
    )
    assert [one.name for one in guidance.passes(0)] == ["cond", "b", "a"]
    assert [one.name for one in guidance.passes(2)] == ["cond", "a", "b"]
    assert guidance.weights(0) == (4.0, -2.0, -1.0) and guidance.weights(2) == (4.0, -1.0, -2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"stg_scale": {"spatial": 1.0}, "stg_blocks": TWO},
            "stg_scale: .* spatial, temporal, .* got spatial",
        ),
        ({"stg_scale": {"spatial": 1.0}, "stg_blocks": [1]}, "stg_scale: .* each of skip, .* got spatial"),
        (
            {"stg_scale": 1.0, "stg_blocks": {"cond": [1]}},
            "stg_blocks: expected names of skip passes .* 'cond'",
        ),
        ({"stg_scale": 1.0, "stg_blocks": {"": [1]}}, "stg_blocks: expected names of skip passes .* got ''"),
        ({"stg_scale": 1.0, "stg_blocks": {"a": [1], "b": []}}, "stg_blocks: expected blocks for stg_scale"),
    ],
)
def test_names_of_passes_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        tables(SIGMAS, **arguments)


def test_dynamic_cfg_rises_from_one_where_timesteps_count_the_steps() -> None:
    scales = dynamic_cfg(6.0, [4.0, 3.0, 2.0, 1.0])
    assert scales[0] == 1.0 and scales == sorted(scales)
    assert scales[2] == pytest.approx(1 + 6 * (1 - math.cos(math.pi / 32)) / 2)
    assert all(1 <= scale <= 7 for scale in dynamic_cfg(6.0, [999.0, 500.0, 3.0]))
