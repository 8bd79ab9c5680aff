"""A call step by step is the call, and its seconds are all accounted for."""

from __future__ import annotations

import inspect
import time
from typing import Any

import pytest
import torch

from stg_trt import VideoPipeline
from stg_trt.errors import InvalidRequest, NotFinite
from stg_trt.models.text import TextCondition
from stg_trt.runtime.stages import STAGES, StageClock
from tests.support.family_cases import LTX, FamilyCase
from tests.support.whole_pipelines import NEGATIVE, PROMPTS, STEPS, call, seeded

ONE = pytest.mark.parametrize("case", [LTX], ids=str, indirect=True)


def of(case: FamilyCase, pipeline: VideoPipeline, prompts: list[str] = PROMPTS) -> dict[str, Any]:
    pipeline.scheduler = case.schedulers[0]
    return {**call(case, pipeline, prompts), "generator": seeded(1), "output_type": "pt"}


def test_a_stream_ends_with_the_video_of_the_call(case: FamilyCase, pipeline: VideoPipeline) -> None:
    expected = pipeline(**of(case, pipeline)).frames
    seen: list[torch.Tensor] = []

    def callback(pipe: VideoPipeline, step: int, timestep: float, tensors: dict[str, torch.Tensor]) -> None:
        seen.append(tensors["latents"].clone())

    pipeline(**of(case, pipeline), callback_on_step_end=callback)
    stream = pipeline.stream(**of(case, pipeline))
    with pytest.raises(InvalidRequest, match="stream: expected its last step to be taken"):
        _ = stream.output
    steps = [*stream]
    assert torch.equal(stream.output.frames, expected)
    assert [step.index for step in steps] == [*range(STEPS)] == [*range(steps[0].steps)]
    assert [step.timestep for step in steps] == [float(one) for one in pipeline.scheduler.timesteps]
    assert all(0 < step.noise_level <= 1 and step.seconds > 0 for step in steps)
    for step, latents in zip(steps, seen, strict=True):
        assert torch.equal(step.latents, latents)


@ONE
@pytest.mark.parametrize("how", ["interrupt", "close"])
def test_a_stream_can_end_early(case: FamilyCase, pipeline: VideoPipeline, how: str) -> None:
    whole = pipeline(**of(case, pipeline)).frames
    stream = pipeline.stream(**of(case, pipeline))
    next(stream)
    second = next(stream)
    if how == "interrupt":
        pipeline.interrupt = True
        assert [*stream] == [] and not torch.equal(stream.output.frames, whole)
    else:
        with pytest.raises(InvalidRequest, match="expected one call at a time"):
            pipeline(**of(case, pipeline))
        stream.close()
        with pytest.raises(InvalidRequest, match="stream: "):
            _ = stream.output
    assert second.index == 1
    assert torch.equal(pipeline(**of(case, pipeline)).frames, whole)


@ONE
def test_a_stream_says_at_once_which_step_was_not_finite(case: FamilyCase, pipeline: VideoPipeline) -> None:
    def spoil(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> Any:
        return {"latents": tensors["latents"] * torch.nan} if index == 0 else tensors

    stream = pipeline.stream(**of(case, pipeline), callback_on_step_end=spoil)
    next(stream)
    with pytest.raises(NotFinite, match="after step 2 of 2"):
        next(stream)


@ONE
def test_the_stages_are_the_whole_call(case: FamilyCase, pipeline: VideoPipeline) -> None:
    start = time.perf_counter()
    made = pipeline(**of(case, pipeline))
    took = time.perf_counter() - start
    assert {"denoise", "decode"} <= made.stages.keys() <= {*STAGES}
    assert 0.98 * took <= sum(made.stages.values()) <= took


@ONE
def test_what_a_stream_waits_for_is_no_stage(case: FamilyCase, pipeline: VideoPipeline) -> None:
    start = time.perf_counter()
    stream = pipeline.stream(**of(case, pipeline))
    seconds = []
    for step in stream:
        time.sleep(0.2)
        seconds.append(step.seconds)
    stages = stream.output.stages
    assert sum(stages.values()) <= time.perf_counter() - start - 0.2 * STEPS
    assert sum(seconds) <= stages["denoise"]


@ONE
def test_what_is_done_with_a_video_is_no_stage(case: FamilyCase, pipeline: VideoPipeline) -> None:
    start = time.perf_counter()
    made = pipeline(**of(case, pipeline), callback_on_video_end=lambda *_: time.sleep(0.2))
    took = time.perf_counter() - start
    assert sum(made.stages.values()) <= took - 0.2 * len(PROMPTS)


def test_a_prompt_is_encoded_once(
    case: FamilyCase, pipeline: VideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[list[str]] = []
    encode = pipeline.components.encode

    def counted(prompts: list[str], *given: Any) -> TextCondition:
        encoded.append(prompts)
        return encode(prompts, *given)

    monkeypatch.setattr(pipeline.components, "encode", counted)
    prompt = "a blue circle moving left"
    first, second = (pipeline(**of(case, pipeline, [prompt])).frames for _ in range(2))
    assert torch.equal(first, second)
    assert encoded.count([prompt]) == 1 and encoded.count([NEGATIVE]) <= 1
    other = pipeline(**of(case, pipeline, ["a red circle left"])).frames
    assert not torch.equal(other, first)


def test_both_have_the_same_arguments() -> None:
    one, other = (inspect.signature(way) for way in (VideoPipeline.__call__, VideoPipeline.stream))
    assert one.parameters == other.parameters and "stg_scale" in one.parameters
    assert (one.return_annotation, other.return_annotation) == ("VideoPipelineOutput", "VideoStream")


def test_an_inner_stage_is_not_the_outer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now, clock = 0, StageClock()
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    for _ in range(2):  # A call has nothing of the one before.
        with clock.call():
            now += 1
            with clock.stage("text"):
                now += 2
                with clock.stage("load"):
                    now += 4
                now += 8
            with clock.stage(None):
                now += 16
            with pytest.raises(KeyError), clock.stage("decode"):
                now += 32
                raise KeyError
    assert clock.seconds == {"load": 4, "text": 10, "denoise": 1, "decode": 32}
    assert [*clock.seconds] == ["load", "text", "denoise", "decode"]
