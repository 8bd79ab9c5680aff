"""Every golden case through ONNX Runtime engines in both layouts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from safetensors.torch import load_file

from stg_trt import VideoPipeline
from stg_trt.cli.inspect import describe
from stg_trt.engines.store import EngineStore
from stg_trt.models.segment import LAYOUTS
from tests.support.family_cases import CASES, COGVIDEOX, FamilyCase
from tests.support.golden_calls import GOLDENS, arguments, every_step, flipped, joined, seeded

Open = Callable[[FamilyCase, str], VideoPipeline]


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def opened(golden_engines: Callable[[FamilyCase], Path]) -> Open:
    """A family's pipeline over the engines of a layout, opened once."""

    @cache
    def pipeline(case: FamilyCase, layout: str) -> VideoPipeline:
        return VideoPipeline.from_pretrained(case.goldens, engines=golden_engines(case), layout=layout)

    return pipeline


@pytest.mark.parametrize(("case", "golden"), GOLDENS, ids=str)
def test_every_step_matches_in_both_layouts(opened: Open, case: FamilyCase, golden: str) -> None:
    expected = load_file(case.goldens / f"{golden}.safetensors")
    last = []
    for layout in LAYOUTS:
        steps = every_step(opened(case, layout), **arguments(golden, case.goldens))
        assert len(steps) == sum(name.startswith("expected_step_") for name in expected)
        for i, latents in enumerate(steps):
            assert (latents - expected[f"expected_step_{i:02d}"]).abs().max() <= 1e-4, f"{layout}, step {i}"
        last.append(steps[-1])
    assert (last[0] - last[1]).abs().max() <= 1e-5 * last[0].abs().max().clamp_min(1)


@pytest.mark.parametrize(("case", "golden"), GOLDENS, ids=str)
def test_two_videos_equal_one_by_one(opened: Open, layout: str, case: FamilyCase, golden: str) -> None:
    pipeline, call = opened(case, layout), arguments(golden, case.goldens)
    other = flipped(call) | {"prompt_embeds": call["prompt_embeds"] * 0.5}
    together = pipeline(**joined(call, other) | {"generator": [seeded(1), seeded(2)]}).frames
    apart = torch.cat(
        [pipeline(**one | {"generator": seeded(i)}).frames for i, one in ((1, call), (2, other))]
    )
    assert not torch.allclose(apart[0], apart[1], atol=1e-2)
    assert (together - apart).abs().max() <= 1e-5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_call_leaves_nothing_behind(opened: Open, layout: str, case: FamilyCase) -> None:
    pipeline = opened(case, layout)
    first = arguments(case.golden_names[0], case.goldens) | {"stg_scale": 0.0}
    plain = pipeline(**first | {"generator": seeded(1)}).frames
    for golden in case.golden_names:
        pipeline(**arguments(golden, case.goldens))
    assert torch.equal(pipeline(**first | {"generator": seeded(1)}).frames, plain)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stg_on_a_range_of_steps(opened: Open, layout: str, case: FamilyCase) -> None:
    """By range or by one scale per step; the other steps are those without."""
    pipeline = opened(case, layout)
    mode, blocks = case.twins[0]
    call = arguments(case.golden_names[-1], case.goldens)
    call |= {"stg_scale": 1.0, "stg_mode": mode, "stg_blocks": blocks}
    steps = len(every_step(pipeline, **call | {"generator": seeded(1)}))
    listed = [float(1 <= i < 3) for i in range(steps)]
    settings: dict[str, dict[str, Any]] = {
        "range": {"stg_range": (1, 3)},
        "list": {"stg_scale": listed},
        "off": {"stg_scale": 0.0},
    }
    taken = {
        name: every_step(pipeline, **call | given | {"generator": seeded(1)})
        for name, given in settings.items()
    }
    assert all(torch.equal(a, b) for a, b in zip(taken["range"], taken["list"], strict=True))
    assert torch.equal(taken["range"][0], taken["off"][0])
    assert not torch.allclose(taken["range"][1], taken["off"][1], atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inspect_shows_the_states_that_the_model_is_used_in(
    golden_engines: Callable[[FamilyCase], Path], layout: str, case: FamilyCase
) -> None:
    builds = EngineStore.open(golden_engines(case)).builds
    described = describe(next(build for build in builds if build.manifest.layout == layout))
    states = described["guidance_states"]
    distilled = case.family.embedded_guidance is not None
    assert list(states) == (["cond", "stg"] if distilled else ["cond", "cfg", "cfg+stg"])
    with_stg = states["stg" if distilled else "cfg+stg"]
    assert with_stg["flops"] < with_stg["flops_full"]
    assert all(set(segment["rows"]) == set(states) for segment in described["segments"])


@pytest.mark.slow(reason="builds the engines of CogVideoX 5B")
def test_noise_is_that_of_the_call(golden_engines: Callable[[FamilyCase], Path], layout: str) -> None:
    """Of a solver that adds it, after runs that add none, or more of it."""
    case = COGVIDEOX["5b"]
    engines, call = golden_engines(case), arguments("stg_r", case.goldens)
    pipeline = VideoPipeline.from_pretrained(case.goldens, engines=engines, layout=layout)
    first, adding = pipeline(**call).frames, pipeline.scheduler
    again = call | {"generator": seeded(11)}
    assert torch.equal(pipeline(**again).frames, first)
    pipeline.scheduler = CogVideoXDDIMScheduler.from_config(adding.config)
    without = pipeline(**call).frames
    assert torch.equal(pipeline(**call | {"generator": seeded(12)}).frames, without)
    pipeline.scheduler = adding
    pipeline(**call | {"num_inference_steps": 9})
    # Longer sums are rounded otherwise.
    assert torch.allclose(pipeline(**again | {"generator": seeded(11)}).frames, first, atol=1e-4)
    assert not torch.allclose(pipeline(**call | {"generator": seeded(12)}).frames, first, atol=0.1)
