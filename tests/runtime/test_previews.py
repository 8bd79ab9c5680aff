"""Where a step is heading: the clean latents, whatever the scheduler's noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from stg_trt import VideoPipeline
from stg_trt.guidance.solver import SolverTable
from stg_trt.models.preview import PreviewMap
from stg_trt.runtime.previews import Previews, shares_of
from tests.support.family_cases import LTX, FamilyCase
from tests.support.whole_pipelines import PROMPTS, STEPS, call, seeded

SCHEDULERS = [
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
    DDIMScheduler(clip_sample=False),
    CogVideoXDDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    ),
    UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0),
]


class Latents:
    """A family whose latents are what its VAE takes."""

    def finished(self, latents: torch.Tensor, *others: Any) -> torch.Tensor:
        return latents

    def vae_latents(self, decoder: Any, latents: torch.Tensor, *others: Any) -> torch.Tensor:
        return latents


class Seen(PreviewMap):
    """Shows latents as they are."""

    def frames(self, latents: torch.Tensor) -> Any:
        return latents.numpy()


class Decoder:
    vae = torch.nn.Linear(1, 1)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda one: type(one).__name__)
def test_a_step_along_the_line_to_the_video_shows_it(scheduler: Any) -> None:
    """The line is that of the scheduler's own noise on a video."""
    scheduler.set_timesteps(6)
    solver = SolverTable.from_scheduler(scheduler)
    shares = shares_of(solver, scheduler)
    assert shares is not None and len(shares) == len(solver.timesteps) + 1
    video, noise = (torch.randn(1, 4, 2, 3, 3, generator=seeded(seed)) for seed in range(2))
    noised = [clean * video + level * noise for clean, level in shares]
    family: Any = Latents()
    workload: Any = None
    previews = Previews(Seen((), (0, 0, 0), 1.0), family, workload, Decoder(), shares, None, noised[0])
    for step, latents in enumerate(noised[1:]):
        assert np.abs(previews.after(step, latents) - video.numpy()).max() <= 1e-3
    if hasattr(scheduler, "add_noise"):
        times = scheduler.timesteps[1:2]
        assert torch.allclose(scheduler.add_noise(video, noise, times), noised[1], atol=1e-4)


@pytest.mark.parametrize("case", [LTX], ids=str, indirect=True)
def test_the_last_preview_is_of_the_final_latents(case: FamilyCase, pipeline: VideoPipeline) -> None:
    pipeline.scheduler = case.schedulers[0]
    given = {**call(case, pipeline, PROMPTS), "generator": seeded(1)}
    latents = pipeline(**given, output_type="latent").frames
    steps = [*pipeline.stream(**given, output_type="pt")]
    colours, decoder = pipeline.store.builds[0].manifest.preview, pipeline.components.decoder
    assert colours is not None
    expected = colours.frames(pipeline.family.vae_latents(decoder, latents, case.workload))
    assert steps[-1].preview is not None and np.array_equal(steps[-1].preview, expected)
    assert expected.shape == (2, *pipeline.family.latent_shape(case.workload)[1:], 3)
    assert len({step.preview.tobytes() for step in steps if step.preview is not None}) == STEPS


@pytest.mark.parametrize("case", [LTX], ids=str, indirect=True)
def test_distances_are_from_the_prompts_prediction(case: FamilyCase, pipeline: VideoPipeline) -> None:
    pipeline.scheduler = case.schedulers[0]
    given = {**call(case, pipeline, PROMPTS), "generator": seeded(1), "output_type": "latent"}

    def of(**others: Any) -> list[dict[str, float]]:
        return [dict(step.distances) for step in pipeline.stream(**{**given, **others})]

    guided = of(stg_scale=[0, 1, 1, 1])
    assert [[*one] for one in guided] == [["uncond"], *[["uncond", "skip"]] * 3]
    assert all(value > 1e-4 for one in guided for value in one.values())
    same = of(negative_prompt=PROMPTS, stg_scale=0.0)
    assert all(one["uncond"] < 1e-5 for one in same)
    assert of(guidance_scale=1.0, stg_scale=0.0) == [{}] * STEPS
