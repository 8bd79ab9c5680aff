"""Options that a call leaves open are decided in one place; those that it gives are checked once."""

from __future__ import annotations

from typing import Any

import pytest

from stg_trt.errors import InvalidRequest
from stg_trt.guidance import options as options_module
from stg_trt.guidance.options import GuidanceOptions, choose_options
from stg_trt.guidance.presets import Preset, load_preset
from stg_trt.guidance.resolved import OFF, ResolvedGuidance
from stg_trt.models.defaults import Defaults

PRESET = "ltx-video-13b-0.9.8-dev"
FAMILY = ResolvedGuidance(5.0, 1.5, 0.25, "stg-r", (3, 4))
DEFAULTS = Defaults(
    stg_mode="stg-r",
    stg_blocks=(9,),
    stg_scale=1.5,
    guidance_scale=5.0,
    rescale=0.25,
    num_inference_steps=40,
    frame_rate=25.0,
    text_length=128,
)
GIVEN: dict[str, Any] = {
    "guidance_scale": 2.0,
    "stg_scale": [0.0, 1.0],
    "rescale": 0.5,
    "stg_mode": "stg-a",
    "stg_blocks": [1],
    "cfg_zero_star": False,
}
OTHERS: dict[str, Any] = {"stg_range": (0, 1), "use_dynamic_cfg": True}


def test_what_is_open_is_the_familys() -> None:
    assert GuidanceOptions().resolve(FAMILY) == FAMILY
    assert GuidanceOptions().resolve(OFF) == OFF


def test_a_preset_decides_all_that_the_family_would() -> None:
    resolved = GuidanceOptions(preset=PRESET).resolve(FAMILY)
    assert resolved == load_preset(PRESET).guidance and resolved.cfg_zero_star


@pytest.mark.parametrize("preset", [None, PRESET])
@pytest.mark.parametrize("name", GIVEN)
def test_what_the_call_gives_wins_alone(name: str, preset: str | None) -> None:
    lower = GuidanceOptions(preset=preset).resolve(FAMILY)
    resolved = GuidanceOptions(**{name: GIVEN[name]}, preset=preset).resolve(FAMILY)
    assert getattr(resolved, name) == GIVEN[name]
    assert all(getattr(resolved, other) == getattr(lower, other) for other in GIVEN if other != name)


def test_what_only_a_call_has_is_passed_on() -> None:
    resolved = GuidanceOptions(**GIVEN, **OTHERS).resolve(FAMILY)
    assert resolved == ResolvedGuidance(**GIVEN, **OTHERS)


def test_the_engines_decide_what_is_perturbed() -> None:
    usual = ResolvedGuidance.of_family(DEFAULTS, "stg-a", {"skip": (2,)})
    assert usual == ResolvedGuidance(5.0, 1.5, 0.25, "stg-a", {"skip": (2,)})
    assert ResolvedGuidance.of_family(DEFAULTS, "stg-a", {}) == ResolvedGuidance(5.0, 0.0, 0.25, "stg-a", ())


def test_a_preset_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(name: str) -> Preset:
        read.append(name)
        return load_preset(name)

    monkeypatch.setattr(options_module, "load_preset", counted)
    options = GuidanceOptions(preset=PRESET)
    assert options.published is not None and options.published.drop_last == 3
    options.resolve(FAMILY)
    assert read == [PRESET]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stg_mode": "stg-x"}, "stg_mode: expected one of stg-a, stg-r, got 'stg-x': choose one of them"),
        ({"preset": "ltx"}, f"preset: expected one of .*{PRESET}, .*, got 'ltx': correct the name"),
    ],
)
def test_names_are_checked_when_the_options_are_made(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        GuidanceOptions(**given)


def test_options_come_whole_or_one_by_one() -> None:
    arguments, whole = GuidanceOptions(stg_scale=1.0), GuidanceOptions(rescale=0.5)
    assert choose_options(None, arguments) is arguments
    assert choose_options(whole, GuidanceOptions()) is whole
    assert choose_options(None, GuidanceOptions()) == GuidanceOptions()


@pytest.mark.parametrize(("name", "value"), [*GIVEN.items(), *OTHERS.items(), ("preset", PRESET)])
def test_options_that_come_both_ways_are_refused(name: str, value: Any) -> None:
    with pytest.raises(
        InvalidRequest, match=rf"guidance: expected .* inside it, got {name} beside it: move"
    ) as told:
        choose_options(GuidanceOptions(), GuidanceOptions(**{name: value}))
    assert "\n" not in str(told.value)


def test_a_dict_is_no_options() -> None:
    given: Any = {"stg_scale": 1.0}
    with pytest.raises(InvalidRequest, match="guidance: expected GuidanceOptions, got dict: write guidance="):
        choose_options(given, GuidanceOptions())


RISING = ResolvedGuidance(guidance_scale=3.0, min_guidance_scale=1.0)


def test_scales_over_the_frames() -> None:
    assert GuidanceOptions().resolve(RISING) == RISING
    given = GuidanceOptions(min_guidance_scale=1.5, max_guidance_scale=2).resolve(RISING)
    assert (given.min_guidance_scale, given.guidance_scale) == (1.5, 2)


@pytest.mark.parametrize(
    ("given", "fallback", "message"),
    [
        (
            {"guidance_scale": 3.0},
            RISING,
            "guidance_scale: expected min_guidance_scale and max_guidance_scale for",
        ),
        (
            {"true_cfg_scale": 3.0},
            RISING,
            "true_cfg_scale: expected min_guidance_scale and max_guidance_scale",
        ),
        (
            {"max_guidance_scale": 3.0},
            OFF,
            "max_guidance_scale: expected guidance_scale for this model, whose",
        ),
        (
            {"min_guidance_scale": 3.0},
            OFF,
            "min_guidance_scale: expected guidance_scale for this model, whose",
        ),
        (
            {"max_guidance_scale": [3.0, 1.0]},
            RISING,
            "max_guidance_scale: expected one number for all steps, got",
        ),
        ({"use_dynamic_cfg": True}, RISING, "use_dynamic_cfg: expected it off for a model whose CFG rises"),
    ],
)
def test_scales_that_a_model_does_not_have(
    given: dict[str, Any], fallback: ResolvedGuidance, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        GuidanceOptions(**given).resolve(fallback)
