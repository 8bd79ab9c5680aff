"""A timestep per token and a picture in the place of the first frame: one build, with one and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from torch import Tensor

from stg_trt import VideoPipeline, build
from stg_trt.cli.inspect import describe
from stg_trt.engines.store import EngineStore
from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.segment import LAYOUTS
from tests.support.compared_calls import assert_close, noisy_picture, seeded, steps_of
from tests.support.eager_reference import perturbed
from tests.support.tiny_image_to_video import wan_ti2v

SIZES: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9}
LATENTS, TOKENS, STEPS = (4, 3, 4, 6), 9, 4

SLOW_FIXTURES = {"engines": "builds the engines of Wan 2.2 TI2V"}


def picture(seed: int = 0) -> Image.Image:
    return noisy_picture(SIZES["height"], SIZES["width"], seed)


def arguments(**changes: Any) -> dict[str, Any]:
    cond, uncond = torch.randn(2, 1, TOKENS, 24, generator=seeded(3))
    embeds = {"prompt_embeds": cond, "negative_prompt_embeds": uncond}
    common = {"guidance_scale": 4.0, "num_inference_steps": STEPS, "output_type": "latent"}
    return {**SIZES, **embeds, **common, "generator": seeded(), **changes}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("ti2v")
    return folder, wan_ti2v(folder)


@pytest.fixture(scope="module")
def engines(saved: tuple[Path, Any]) -> Path:
    shared = {**SIZES, "text_length": TOKENS, "stg_blocks": [1], "max_batch": 2, "verify_timesteps": 1}
    for layout in LAYOUTS:
        build(saved[0], saved[0] / "engines", **shared, stg_mode="stg-a", layout=layout)
    return saved[0] / "engines"


def opened(saved: tuple[Path, Any], engines: Path, layout: str = "segmented") -> VideoPipeline:
    return VideoPipeline.from_pretrained(saved[0], engines, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_step_with_a_picture(saved: tuple[Path, Any], engines: Path, layout: str) -> None:
    """The first frame is stepped as the others are, and the picture's once at the end."""
    call = arguments(image=picture())
    expected = steps_of(saved[1], **call, max_sequence_length=TOKENS)
    got = steps_of(opened(saved, engines, layout), **call | {"generator": seeded()}, stg_scale=0.0)
    assert_close(got, expected)
    assert not torch.allclose(got[-1][:, :, 0], got[-2][:, :, 0], atol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_step_without(saved: tuple[Path, Any], engines: Path, layout: str) -> None:
    """After a call with a picture, of which nothing is left."""
    own = _text_to_video(saved[1])
    expected = steps_of(own, **arguments(), max_sequence_length=TOKENS)
    pipeline = opened(saved, engines, layout)
    pipeline(**arguments(image=picture()))
    assert_close(steps_of(pipeline, **arguments(), stg_scale=0.0), expected)


def _text_to_video(own: Any) -> Any:
    parts = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    pipeline = WanPipeline(**{name: own.components[name] for name in parts}, expand_timesteps=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def eager_steps(own: Any, mode: str, stg_scale: float) -> list[Tensor]:
    """CFG and STG written plainly on diffusers' model, with what its pipeline makes of the picture."""
    call, scheduler, model = arguments(), own.scheduler, own.transformer
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(1, *LATENTS, generator=seeded())
    pixels = own.video_processor.preprocess(picture(), SIZES["height"], SIZES["width"])
    sizes = SIZES["height"], SIZES["width"], SIZES["num_frames"]
    _, condition, mask = own.prepare_latents(
        pixels, 1, 4, *sizes, torch.float32, torch.device("cpu"), seeded(), latents, None
    )
    found = []
    for t in scheduler.timesteps:
        given = (1 - mask) * condition + mask * latents
        of_tokens = (mask[0][0][:, ::2, ::2] * t).flatten()[None]

        def predict(name: str, given: Tensor = given, of_tokens: Tensor = of_tokens) -> Tensor:
            return model(given, of_tokens, call[name], return_dict=False)[0]  # type: ignore[no-any-return]

        cond, uncond = predict("prompt_embeds"), predict("negative_prompt_embeds")
        with perturbed(model, mode, (1,)):
            skip = predict("prompt_embeds")
        pred = uncond + 4.0 * (cond - uncond) + stg_scale * (cond - skip)
        latents = scheduler.step(pred, t, latents, return_dict=False)[0]
        found.append(latents)
    return [*found, (1 - mask) * condition + mask * latents]


@pytest.mark.parametrize(
    ("layout", "mode"), [("segmented", "stg-a"), ("segmented", "stg-r"), ("twin", "stg-a")]
)
def test_every_step_with_stg(saved: tuple[Path, Any], engines: Path, layout: str, mode: str) -> None:
    expected = eager_steps(saved[1], mode, 1.5)
    call = arguments(image=picture(), stg_scale=1.5, stg_mode=mode)
    assert_close(steps_of(opened(saved, engines, layout), **call), expected)


def test_two_videos_equal_one_by_one(saved: tuple[Path, Any], engines: Path) -> None:
    pipeline = opened(saved, engines)
    calls = [arguments(image=picture(i), generator=seeded(i)) for i in range(2)]
    apart = [pipeline(**call).frames for call in calls]
    both = {name: torch.cat([call[name] for call in calls]) for name in calls[0] if name.endswith("embeds")}
    several = {"image": [call["image"] for call in calls], "generator": [seeded(0), seeded(1)]}
    together = pipeline(**calls[0] | both | several).frames
    assert not torch.allclose(apart[0], apart[1], atol=1e-2)
    assert (together - torch.cat(apart)).abs().max() <= 1e-5


def test_frames_are_those_of_diffusers(saved: tuple[Path, Any], engines: Path) -> None:
    call = arguments(image=picture(), output_type="np")
    expected = saved[1](**call, max_sequence_length=TOKENS).frames
    got = opened(saved, engines)(**call | {"generator": seeded()}, stg_scale=0.0).frames
    assert got.shape == expected.shape == (1, 9, 64, 96, 3)
    assert np.abs(got - expected).max() <= 1e-3


def test_there_is_no_last_picture(saved: tuple[Path, Any], engines: Path) -> None:
    with pytest.raises(InvalidRequest, match="last_image: expected none, for which this wan2"):
        opened(saved, engines)(**arguments(image=picture(), last_image=picture()))


def test_other_graphs_of_the_same_weights_are_told_apart(saved: tuple[Path, Any], engines: Path) -> None:
    (build, _) = EngineStore.open(engines).builds
    assert describe(build)["family"] == "wan2.2"
    checkpoint = Checkpoint.open(saved[0])
    assert checkpoint.model_index is not None
    plain = replace(checkpoint, model_index={**checkpoint.model_index, "expand_timesteps": False})
    assert plain.fingerprint() != checkpoint.fingerprint() == build.manifest.weights
