"""The constants of a run: position tables are kept between runs, the text is not."""

from __future__ import annotations

import pytest
from torch import Tensor

from stg_trt.models.image import Places
from stg_trt.models.workload import Workload
from stg_trt.runtime.device import Cpu
from stg_trt.runtime.sampler import Sampler
from tests.support.eager_sampler import assert_same, run, sampler_on
from tests.support.family_cases import LTX


@pytest.fixture
def sampler() -> Sampler:
    return sampler_on(Cpu())


@pytest.fixture
def rates(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The frame rates for which the sampler's family has computed position tables."""
    compute, seen = sampler.family.position_tables, list[float]()

    def noted(workload: Workload, frame_rate: float, placed: Places = ()) -> dict[str, Tensor]:
        seen.append(frame_rate)
        return compute(workload, frame_rate, placed)

    monkeypatch.setattr(sampler.family, "position_tables", noted)
    return seen


def test_position_tables_are_computed_once_per_frame_rate(sampler: Sampler, rates: list[float]) -> None:
    at_25 = run(sampler, frame_rate=25.0)
    assert_same(run(sampler, frame_rate=25.0), at_25)
    assert rates == [25.0]
    at_12 = run(sampler, frame_rate=12.0)
    assert (at_12[-1] - at_25[-1]).abs().max() > 1e-3
    assert_same(at_12, run(sampler_on(Cpu()), frame_rate=12.0))
    assert_same(run(sampler, frame_rate=25.0), at_25)
    assert rates == [25.0, 12.0, 25.0]


def test_new_memory_has_no_tables_yet(sampler: Sampler, rates: list[float]) -> None:
    two = run(sampler, videos=2)
    run(sampler, videos=1)
    assert_same(run(sampler, videos=2), two)
    assert rates == [25.0] * 3


def test_tables_that_could_not_be_written_are_written_again(
    sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, compute = run(sampler, frame_rate=25.0), sampler.family.position_tables

    def misshapen(workload: Workload, frame_rate: float, placed: Places = ()) -> dict[str, Tensor]:
        tables = compute(workload, frame_rate, placed)
        return {**tables, "rope_sin": tables["rope_sin"][1:]}

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="size"):
        patch.setattr(sampler.family, "position_tables", misshapen)
        run(sampler, frame_rate=12.0)
    assert_same(run(sampler, frame_rate=25.0), expected)


def test_the_text_is_written_for_every_run(sampler: Sampler) -> None:
    before = run(sampler)
    other = LTX.text(2, seed=7)
    other.mask[1] = 1
    changed = run(sampler, cond=other)
    assert all((changed[-1][i] - before[-1][i]).abs().max() > 1e-3 for i in range(2))
    assert_same(changed, run(sampler_on(Cpu()), cond=other))
    assert_same(run(sampler), before)
