"""LTX-Video checkpoints of LTXConditionPipeline (0.9.7 and later), compared with it, without conditions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LTXConditionPipeline,
    LTXPipeline,
)
from torch import Tensor

from stg_trt import VideoPipeline
from stg_trt.errors import InvalidRequest
from stg_trt.guidance.bins import TimestepBins
from stg_trt.guidance.presets import load_preset
from stg_trt.guidance.solver import SolverTable
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.workload import Workload
from tests.support.family_cases import LTX, FamilyCase
from tests.support.whole_pipelines import TEXT_LENGTH

PROMPTS = ["a red circle moving left", "a blue square"]
SCHEDULER = FlowMatchEulerDiscreteScheduler()
# As diffusers' documentation calls the distilled models, and as their own configuration lists the steps.
DISTILLED = [1000, 993, 987, 981, 975, 909, 725, 0.03]
PUBLISHED = [1000, 993.7, 987.5, 981.2, 975, 909.4, 725]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("condition-checkpoint")
    LTX.save_pipeline(folder)
    LTXConditionPipeline.from_pretrained(folder, scheduler=SCHEDULER).save_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "LTXConditionPipeline"
    return folder


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path, whole_engines: Callable[[FamilyCase, Path], Path]) -> VideoPipeline:
    """Over the engines of LTXPipeline's checkpoint, which has the same transformer."""
    return VideoPipeline.from_pretrained(checkpoint, engines=whole_engines(LTX, checkpoint))


@pytest.fixture(scope="module")
def published() -> ModelFamily:
    return Checkpoint.open("ltx-video-13b", random_weights=True).family


def request_of_both(output_type: str) -> dict[str, Any]:
    """Arguments that both take; the noise is drawn, since LTXConditionPipeline ignores latents."""
    return {
        "prompt": PROMPTS,
        "negative_prompt": ["blurred"] * 2,
        "height": LTX.workload.height,
        "width": LTX.workload.width,
        "num_frames": LTX.workload.num_frames,
        "num_inference_steps": 5,
        "guidance_scale": 4.0,
        "frame_rate": 12,
        "generator": [torch.Generator().manual_seed(seed) for seed in (1, 2)],
        "output_type": output_type,
    }


def of_diffusers(checkpoint: Path, scheduler: Any, **given: Any) -> Tensor:
    """Packed latents, as we return them."""
    theirs = LTXConditionPipeline.from_pretrained(checkpoint, scheduler=scheduler)
    theirs.set_progress_bar_config(disable=True)
    with torch.no_grad():
        frames: Tensor = theirs(**given, max_sequence_length=TEXT_LENGTH).frames
    return frames


@pytest.mark.parametrize("steps", [{}, {"timesteps": DISTILLED}], ids=["usual", "distilled"])
@pytest.mark.parametrize(
    "config", [{}, {"shift": 3.0}, {"shift_terminal": 0.1}, {"shift": 0.5, "shift_terminal": 0.02}], ids=str
)
def test_steps_per_token_are_those_of_diffusers(
    checkpoint: Path, pipeline: VideoPipeline, config: dict[str, Any], steps: dict[str, Any]
) -> None:
    """The network is told timesteps that the scheduler's shift does not move."""
    scheduler = pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**config)
    expected = of_diffusers(checkpoint, scheduler, **request_of_both("latent"), **steps)
    got = pipeline(**request_of_both("latent"), **steps, stg_scale=0.0, rescale=0.0).frames
    assert (got - expected).abs().max() <= 1e-4
    if config:
        pipeline.scheduler = SCHEDULER
        plain = pipeline(**request_of_both("latent"), **steps, stg_scale=0.0, rescale=0.0).frames
        assert (got - plain).abs().max() > 1e-2


class Turned(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # has no types
    """Draws from given generators, and takes the prediction as new noise needs it."""

    generators: list[torch.Generator]

    def step(self, model_output: Tensor, *args: Any, **options: Any) -> Any:
        return super().step(-model_output, *args, generator=self.generators, **options)


def test_new_noise_per_token(checkpoint: Path, pipeline: VideoPipeline) -> None:
    """As in Lightricks' own scheduler; in diffusers' the prediction has the wrong sign there."""
    config = {"shift": 3.0, "stochastic_sampling": True}
    scheduler, given = Turned(**config), request_of_both("latent")
    scheduler.generators = given["generator"]
    expected = of_diffusers(checkpoint, scheduler, **given)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**config)
    got = pipeline(**request_of_both("latent"), stg_scale=0.0, rescale=0.0).frames
    assert (got - expected).abs().max() <= 1e-4


def test_another_flow_scheduler_steps_between_what_the_network_is_told(pipeline: VideoPipeline) -> None:
    """diffusers cannot run it; its shift moves the timesteps too, and listed ones are refused."""
    scheduler = pipeline.scheduler = FlowMatchLCMScheduler(shift=3.0)
    pipeline(**request_of_both("latent"))
    assert torch.equal(scheduler.timesteps, scheduler.sigmas[:-1] * 1000) and scheduler.timesteps[1] > 990
    with pytest.raises(InvalidRequest, match="timesteps: expected a scheduler that steps between them"):
        pipeline(**request_of_both("latent"), timesteps=DISTILLED)


def test_dynamic_shifting_is_refused_as_in_diffusers(pipeline: VideoPipeline) -> None:
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(InvalidRequest, match=r"scheduler: expected steps that Flow.*got 5 steps \(`mu` must"):
        pipeline(**request_of_both("latent"))


def unguided(**given: Any) -> dict[str, Any]:
    """A call that leaves steps and guidance to the defaults."""
    left = {"num_inference_steps", "guidance_scale"}
    return {name: value for name, value in request_of_both("latent").items() if name not in left} | given


def test_a_distilled_checkpoint_runs_as_published(
    checkpoint: Path, pipeline: VideoPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own steps with neither CFG nor STG, and the preset does the same on any checkpoint."""
    link = tmp_path / "LTX-Video-0.9.7-distilled"
    link.symlink_to(checkpoint)
    distilled = VideoPipeline(Checkpoint.open(link), pipeline.store)
    steps = {"timesteps": PUBLISHED, "guidance_scale": 1.0}
    expected = of_diffusers(checkpoint, SCHEDULER, **unguided(**steps))
    with caplog.at_level("INFO", "stg_trt"):
        got = distilled(**unguided()).frames
    assert f"FlowMatchEulerDiscreteScheduler: timesteps {[*map(float, PUBLISHED)]}" in caplog.messages
    assert (got - expected).abs().max() <= 1e-4 and distilled.num_timesteps == 7
    pipeline.scheduler = SCHEDULER
    assert torch.equal(pipeline(**unguided(preset="ltx-video-0.9.8-distilled")).frames, got)
    assert (pipeline(**unguided(timesteps=PUBLISHED)).frames - got).abs().max() > 1e-2
    for asked in (DISTILLED, PUBLISHED[:2]):
        distilled(**unguided(timesteps=asked))
        assert distilled.num_timesteps == len(asked)
    distilled(**unguided(num_inference_steps=4))
    assert distilled.num_timesteps == 4


@pytest.mark.parametrize(
    ("name", "noted", "distilled"),
    [
        ("LTX-Video-0.9.7-distilled", None, True),
        ("models--Lightricks--LTX-Video-0.9.8-13B-distilled/snapshots/1a2b", None, True),
        ("mine", "Lightricks/LTX-Video-0.9.7-distilled", True),
        ("distilled/LTX-Video-0.9.7-dev", "/distilled/models/LTX-Video-0.9.7-dev", False),
    ],
)
def test_what_is_distilled(
    checkpoint: Path, tmp_path: Path, name: str, noted: str | None, distilled: bool
) -> None:
    link = tmp_path / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(checkpoint)
    opened = Checkpoint.open(link)
    opened = replace(opened, transformer_config=opened.transformer_config | {"_name_or_path": noted})
    preset = load_preset("ltx-video-0.9.8-distilled")
    assert opened.family.defaults.steps == (preset.custom if distilled else None)
    assert opened.family.defaults.stg_scale == (0.0 if distilled else 1.0)


def test_the_distilled_models_of_the_older_pipeline_take_eight_steps() -> None:
    named = replace(LTX.checkpoint, name="LTX-Video-0.9.6-distilled").family.defaults
    assert (named.num_inference_steps, named.steps, named.guidance_scale) == (8, None, 1.0)


@pytest.mark.parametrize("output_type", ["latent", "np"])
def test_cfg_is_that_of_diffusers(checkpoint: Path, pipeline: VideoPipeline, output_type: str) -> None:
    answers: dict[type, Any] = {}
    for own in (LTXConditionPipeline, LTXPipeline):
        theirs = own.from_pretrained(checkpoint)
        theirs.set_progress_bar_config(disable=True)
        with torch.no_grad():
            frames = theirs(**request_of_both(output_type), max_sequence_length=TEXT_LENGTH).frames
        if output_type == "latent" and own is LTXPipeline:
            # It returns them packed.
            frames = LTXPipeline._unpack_latents(frames, *answers[LTXConditionPipeline].shape[2:])
        answers[own] = np.asarray(frames)
    pipeline.scheduler = SCHEDULER
    got = np.asarray(pipeline(**request_of_both(output_type), stg_scale=0.0, rescale=0.0).frames)
    assert np.abs(got - answers[LTXConditionPipeline]).max() <= 1e-4
    assert np.abs(got - answers[LTXPipeline]).max() > 1e-2


@pytest.mark.parametrize("frames", [1, 17])
def test_positions_are_those_of_the_causal_vae(published: ModelFamily, frames: int) -> None:
    """The first latent is at 0 s; the next begin 1, 9, 17 frames later."""
    workload = Workload(64, 96, frames, 8)
    places = published._positions(workload, 25.0, ())["video_coords"]  # type: ignore[attr-defined]
    latents = 1 + (frames - 1) // 8
    assert places.shape == (1, 3, latents * 2 * 3)
    time, height, width = places[0].unflatten(1, (latents, 2, 3))
    expected = torch.tensor([0, *(8 * i + 1 for i in range(latents - 1))]) / 25
    assert torch.allclose(time[:, 0, 0], expected)
    assert torch.equal(height[0, :, 0], torch.tensor([0.0, 32.0]))
    assert torch.equal(width[0, 0], torch.tensor([0.0, 32.0, 64.0]))


def test_the_preset_is_made_for_the_published_schedule(published: ModelFamily) -> None:
    """Every bin of the published table has steps; 0.9008 and 0.618 are steps themselves, rounded."""
    preset = load_preset("ltx-video-13b-0.9.8-dev")
    scheduler = Checkpoint.open("ltx-video-13b", random_weights=True).scheduler()
    published.set_timesteps(scheduler, preset.num_inference_steps, Workload(480, 704, 121, 128))
    levels = SolverTable.from_scheduler(scheduler).noise_levels
    assert levels[0] == 1.0 and len(levels) == 30
    assert {round(level, 4) for level in levels} >= {0.9967, 0.9933, 0.985, 0.9767, 0.9008, 0.618}
    assert isinstance(preset.guidance.stg_blocks, TimestepBins)
    taken = [preset.guidance.stg_blocks.at(level) for level in levels]
    assert [len(list(steps)) for steps in (taken[:1], taken[1:3], taken[3:5], taken[5:])] == [1, 2, 2, 25]
    assert set(taken[:1]) == {()} and set(taken[1:3]) == {(11, 25, 35, 39)}
    assert set(taken[3:5]) == {(22, 35, 39)} and set(taken[5:]) == {(28,)}


def test_another_scheduler_makes_its_own_timesteps(published: ModelFamily) -> None:
    scheduler = DDIMScheduler()
    published.set_timesteps(scheduler, 5, Workload(480, 704, 121, 128))
    assert scheduler.timesteps.tolist() == [800, 600, 400, 200, 0]
