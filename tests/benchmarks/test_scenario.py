"""Scenarios: the family's own text length, tokens and passes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stg_trt.benchmarks import diffusers_models
from stg_trt.benchmarks.scenario import Scenario
from stg_trt.errors import InvalidRequest


def test_the_text_length_is_the_familys(scenario: Scenario, wan_scenario: Scenario) -> None:
    lengths = [replace(one, text_length=None).workload.text_length for one in (scenario, wan_scenario)]
    assert lengths == [128, 512]
    assert scenario.workload.text_length == 9


def test_tokens_are_counted_by_the_family(scenario: Scenario, wan_scenario: Scenario) -> None:
    assert scenario.to_json()["tokens"] == 3 * 4 * 5
    assert wan_scenario.to_json()["tokens"] == 3 * 3 * 4


def test_a_family_without_guidance_by_two_prompts(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = scenario.passes
    defaults = replace(scenario.family.defaults, guidance_scale=1.0)
    monkeypatch.setattr(type(scenario.family), "defaults", defaults)
    assert [one.name for one in usual] == ["uncond", "cond", "skip"]
    assert scenario.passes == usual[1:]
    assert scenario.guidance(scenario.inputs(4).solver).passes(2) == scenario.passes


def test_a_family_that_cannot_be_compared(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(diffusers_models._MODELS, scenario.family.name)
    with pytest.raises(InvalidRequest, match="got ltx-video, which the benchmarks cannot compare"):
        scenario.check()
