"""What is measured: the family's own text length, tokens and passes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stg_trt.benchmarks import uncut
from stg_trt.benchmarks.setting import Setting
from stg_trt.errors import InvalidRequest


def test_the_text_length_is_the_familys(setting: Setting, wan_setting: Setting) -> None:
    lengths = [replace(one, text_length=None).workload.text_length for one in (setting, wan_setting)]
    assert lengths == [128, 512]
    assert setting.workload.text_length == 8


def test_tokens_are_counted_by_the_family(setting: Setting, wan_setting: Setting) -> None:
    assert setting.to_json()["tokens"] == 2 * 2 * 2
    assert wan_setting.to_json()["tokens"] == 3 * 3 * 4


def test_a_family_without_guidance_by_two_prompts(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setting.passes == ("uncond", "cond", "skip")
    defaults = replace(setting.family.defaults, guidance_scale=1.0)
    monkeypatch.setattr(type(setting.family), "defaults", defaults)
    assert setting.passes == ("cond", "skip")
    assert setting.guidance(setting.inputs(4).solver).passes(2) == setting.passes


def test_a_family_that_cannot_be_compared(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(uncut._UNCUT, setting.family.name)
    with pytest.raises(InvalidRequest, match="got ltx-video, which the benchmarks cannot compare"):
        setting.check()
