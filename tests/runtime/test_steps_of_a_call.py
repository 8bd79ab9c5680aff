"""Timesteps, sigmas and solvers with noise of their own, on whole tiny checkpoints beside diffusers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from stg_trt import VideoPipeline
from stg_trt.errors import InvalidRequest
from tests.support.family_cases import LTX, FamilyCase
from tests.support.whole_pipelines import PROMPTS, call, of_diffusers, seeded

ONE = pytest.mark.parametrize("case", [LTX], indirect=True, ids=str)
OFF: dict[str, Any] = {"stg_scale": 0.0, "rescale": 0.0, "output_type": "latent"}
SIGMAS = [1.0, 0.9, 0.35]
TIMESTEPS = [999, 800, 250]
V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def with_sigmas(scheduler: Any) -> Any:
    """A new one that steps through SIGMAS whatever a pipeline asks for."""
    base: Any = type(scheduler)

    class Fixed(base):  # type: ignore[misc]  # has no types
        def set_timesteps(
            self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None
        ) -> None:
            super().set_timesteps(sigmas=np.array(SIGMAS), mu=mu)

    return Fixed.from_config(scheduler.config)


@pytest.fixture
def given(case: FamilyCase, pipeline: VideoPipeline) -> dict[str, Any]:
    """A call of one prompt."""
    pipeline.scheduler = case.schedulers[0]
    return call(case, pipeline, PROMPTS[:1])


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max())


def is_flow(case: FamilyCase) -> bool:
    return "CogVideoX" not in case.family.pipeline_class


def test_sigmas_are_those_of_diffusers(
    case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline, given: dict[str, Any]
) -> None:
    """Its pipeline's own argument, or what the scheduler would make of it there."""
    if not is_flow(case):
        with pytest.raises(InvalidRequest, match="sigmas: expected a scheduler that takes sigmas, got CogV"):
            pipeline(**given, sigmas=SIGMAS)
        return
    taken = "sigmas" in inspect.signature(case.pipeline_class.__call__).parameters
    for scheduler in case.schedulers:
        pipeline.scheduler = scheduler
        own = scheduler if taken else with_sigmas(scheduler)
        asked: dict[str, Any] = {"sigmas": SIGMAS} if taken else {}
        expected = of_diffusers(case, checkpoint, own, "latent", **given, **asked)
        got = pipeline(**given, **OFF, sigmas=np.array(SIGMAS)).frames
        assert pipeline.num_timesteps == 3 and distance(got, expected) <= 1e-4
        assert distance(pipeline(**given, **OFF).frames, expected) > 1e-2


def test_timesteps_are_those_of_diffusers(
    case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline, given: dict[str, Any]
) -> None:
    """Schedulers that would step elsewhere are refused in pipelines that have no such argument."""
    if is_flow(case):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        with pytest.raises(InvalidRequest, match="timesteps: expected a scheduler that steps between them"):
            pipeline(**given, timesteps=TIMESTEPS)
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
        got = pipeline(**given, **OFF, timesteps=TIMESTEPS).frames
        same = pipeline(**given, **OFF, sigmas=[timestep / 1000 for timestep in TIMESTEPS]).frames
        assert distance(got, same) <= 1e-5
        return
    with pytest.raises(InvalidRequest, match="timesteps: expected a scheduler that takes timesteps, got"):
        pipeline(**given, timesteps=TIMESTEPS)
    pipeline.scheduler = DPMSolverMultistepScheduler(**V)
    expected = of_diffusers(case, checkpoint, pipeline.scheduler, "latent", **given, timesteps=TIMESTEPS)
    assert distance(pipeline(**given, **OFF, timesteps=tuple(TIMESTEPS)).frames, expected) <= 1e-4


def noisy(case: FamilyCase) -> list[Any]:
    """Schedulers of a family that draw noise in every step."""
    if not is_flow(case):
        return [LCMScheduler(**V), DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **V)]
    inverted = {"invert_sigmas": case.schedulers[0].config.get("invert_sigmas", False)}
    return [
        FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True, **inverted),
        FlowMatchLCMScheduler(shift=3.0, **inverted),
    ]


def test_noise_of_the_solver_is_that_of_diffusers(
    case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline, given: dict[str, Any]
) -> None:
    """Not all pipelines of diffusers hand their generator to the scheduler: theirs draws from torch's own."""
    for scheduler in noisy(case):
        pipeline.scheduler = scheduler
        torch.manual_seed(5)
        expected = of_diffusers(case, checkpoint, scheduler, "latent", **given)
        torch.manual_seed(5)
        got = pipeline(**given, **OFF).frames
        assert expected.std() > 0.01 and distance(got, expected) <= 1e-4
        again, other = (pipeline(**given, **OFF, generator=seeded(seed)).frames for seed in (5, 6))
        assert torch.equal(again, got) and distance(other, got) > 1e-2


@ONE
def test_a_batch_draws_as_its_videos_alone(pipeline: VideoPipeline, given: dict[str, Any]) -> None:
    pipeline.scheduler = FlowMatchLCMScheduler()
    given |= {"latents": None}
    alone = [pipeline(**given, **OFF, generator=[seeded(seed)]).frames for seed in (1, 2)]
    given |= {"num_videos_per_prompt": 2, "generator": [seeded(1), seeded(2)]}
    torch.testing.assert_close(pipeline(**given, **OFF).frames, torch.cat(alone), rtol=0, atol=1e-5)


@ONE
def test_latents_of_a_noisy_solver_stay(pipeline: VideoPipeline, given: dict[str, Any]) -> None:
    pipeline.scheduler = FlowMatchLCMScheduler()
    with pytest.raises(InvalidRequest, match="callback_on_step_end: expected a single-step solver"):
        pipeline(
            **given, callback_on_step_end=lambda pipe, i, t, tensors: {"latents": 0 * tensors["latents"]}
        )


@ONE
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"timesteps": [1000, 500], "sigmas": [1.0, 0.5]},
            "timesteps: expected timesteps or sigmas",
        ),
        ({"sigmas": []}, r"sigmas: expected one number per step, the noisiest first, got \[\]: sort them"),
        ({"sigmas": [0.5, 1.0]}, r"sigmas: expected .*, got \[0.5, 1.0\]"),
        ({"timesteps": [1000, float("nan")]}, r"timesteps: expected .*, got \[1000.0, nan\]"),
        ({"timesteps": 1000}, "timesteps: expected a list with one number per step, got 1000: correct it"),
        ({"sigmas": "1,0.5"}, "sigmas: expected a list with one number per step, got '1,0.5'"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected at least 1, got 0: use 40"),
    ],
)
def test_steps_that_are_none(
    pipeline: VideoPipeline, given: dict[str, Any], wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        pipeline(**given | wrong)


@ONE
def test_more_steps_than_a_scheduler_can_take(pipeline: VideoPipeline, given: dict[str, Any]) -> None:
    pipeline.scheduler = UniPCMultistepScheduler(num_train_timesteps=20, use_flow_sigmas=True, flow_shift=9.0)
    with pytest.raises(
        InvalidRequest, match=r"scheduler: expected steps that UniPC.* got 20 steps: use fewer"
    ):
        pipeline(**given | {"num_inference_steps": 20})


@ONE
def test_what_a_scheduler_says_of_its_steps(pipeline: VideoPipeline, given: dict[str, Any]) -> None:
    pipeline.scheduler = UniPCMultistepScheduler()
    with pytest.raises(InvalidRequest, match=r"scheduler: expected steps that UniPC.* got sigmas \[1.0"):
        pipeline(**given, sigmas=SIGMAS)
    pipeline.scheduler = LCMScheduler(original_inference_steps=2)
    with pytest.raises(InvalidRequest, match=r"scheduler: expected steps that LCM.*, got 4 steps"):
        pipeline(**given)
