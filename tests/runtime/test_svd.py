"""Stable Video Diffusion: the golden, an eager loop with STG, and diffusers' own pipeline from a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from stg_trt import VideoPipeline, build
from stg_trt.cli.inspect import describe
from stg_trt.errors import EngineRejected, InvalidRequest
from stg_trt.models.perturbation import Perturbation
from stg_trt.runtime.command import generate
from tests.conftest import BuiltOnce, OnTwoRanks
from tests.support.eager_svd import Call, distance, sample
from tests.support.golden_builds import SVD_SIZES as SIZES
from tests.support.tiny_svd import SVD, diffusers_pipeline, save_svd

pytestmark = pytest.mark.slow(reason="builds the engines of a UNet")

STEPS = 3
Open = Callable[[str], VideoPipeline]


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def golden() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(SVD / "stg_a_both.safetensors")
    return tensors


@pytest.fixture(scope="module")
def checkpoint(built_once: BuiltOnce) -> Path:
    """Of the goldens' UNet, which its engines are for too."""
    return built_once("svd-checkpoint", save_svd)


@pytest.fixture(scope="module")
def opened(svd_engines: Path, checkpoint: Path) -> Open:
    """The pipeline in a layout."""
    return cache(lambda layout: VideoPipeline.from_pretrained(checkpoint, svd_engines, layout=layout))


@pytest.fixture(scope="module")
def unet() -> Any:
    return UNetSpatioTemporalConditionModel.from_pretrained(SVD, subfolder="unet").eval()


def steps_of(pipeline: VideoPipeline, **call: Any) -> list[Tensor]:
    steps: list[Tensor] = []

    def keep(pipe: Any, index: int, timestep: float, tensors: dict[str, Tensor]) -> None:
        steps.append(tensors["latents"].clone())

    pipeline(**call, callback_on_step_end=keep, output_type="latent")
    return steps


def given(call: Call, **options: Any) -> dict[str, Any]:
    """The tensors of a call in VideoPipeline's names."""
    tensors = {name: getattr(call, name) for name in ("image_embeddings", "image_latents", "latents")}
    return {**tensors, "num_inference_steps": STEPS, **options}


def golden_call() -> Call:
    tensors = golden()
    return Call(tensors["image_embeddings"], tensors["image_latents"], tensors["latents_before_init_sigma"])


def test_every_step_of_the_golden(opened: Open) -> None:
    """Made by the pipeline of STG's authors."""
    steps = steps_of(
        opened("segmented"),
        **given(golden_call()) | {"num_inference_steps": 5},
        stg_scale={"spatial": 1.0, "temporal": 1.0},
        stg_blocks={"spatial": [4], "temporal": [5]},
        min_guidance_scale=1.0,
        max_guidance_scale=3.0,
        fps=7,
        motion_bucket_id=127,
        noise_aug_strength=0.02,
    )
    assert len(steps) == 5
    for i, latents in enumerate(steps):
        assert distance(latents, golden()[f"expected_step_{i:02d}"]) <= 1e-4, f"step {i}"


def test_two_ranks_are_one(opened: Open, on_two_ranks: OnTwoRanks) -> None:
    one = opened("segmented")
    call = given(golden_call(), **guidance(BOTH, low=1.0, high=2.5))
    alone, shared = (steps_of(pipeline, **call)[-1] for pipeline in (one, on_two_ranks(one)))
    assert distance(shared, alone) <= 1e-5


Skips = dict[str, tuple[float, str, Sequence[int]]]
BOTH: Skips = {"spatial": (1.0, "stg-a", [0, 4]), "temporal": (0.5, "stg-a", [5])}
CASES: dict[str, tuple[Skips, dict[str, float]]] = {
    "both": (BOTH, {"low": 1.0, "high": 2.5}),
    "spatial": ({"spatial": (1.5, "stg-a", [4])}, {}),
    "temporal": ({"temporal": (1.0, "stg-a", [5])}, {"rescale": 0.7}),
    "encoder": ({"spatial": (1.0, "stg-a", [0])}, {"low": 0.5, "high": 1.5}),
    "stg-r": ({"spatial": (1.0, "stg-r", [0]), "temporal": (1.0, "stg-r", [5])}, {}),
    "one pass": ({"skip": (1.0, "stg-a", [4, 5])}, {}),
    "no cfg": (BOTH, {"low": 1.0, "high": 1.0}),
    "cond": ({}, {"low": 0.5, "high": 0.5}),
}


def expected_steps(unet: Any, call: Call, skips: Skips, **scales: float) -> list[Tensor]:
    scheduler = EulerDiscreteScheduler.from_pretrained(SVD, subfolder="scheduler")
    passes = [(scale, Perturbation(mode, tuple(blocks))) for scale, mode, blocks in skips.values()]
    return sample(unet, scheduler, call, passes, steps=STEPS, **scales)


def guidance(skips: Skips, **scales: float) -> dict[str, Any]:
    """The arguments of a call for them."""
    modes = {mode for _, mode, _ in skips.values()} or {"stg-a"}
    return {
        "stg_scale": {name: scale for name, (scale, _, _) in skips.items()} or 0.0,
        "stg_mode": modes.pop(),
        **({"stg_blocks": {name: blocks for name, (_, _, blocks) in skips.items()}} if skips else {}),
        "min_guidance_scale": scales.get("low", 1.0),
        "max_guidance_scale": scales.get("high", 3.0),
        "rescale": scales.get("rescale", 0.0),
    }


@pytest.mark.parametrize("name", CASES)
def test_every_step_of_an_eager_loop(opened: Open, unet: Any, name: str) -> None:
    skips, scales = CASES[name]
    expected = expected_steps(unet, golden_call(), skips, **scales)
    steps = steps_of(opened("segmented"), **given(golden_call()), **guidance(skips, **scales))
    for i, latents in enumerate(steps):
        assert distance(latents, expected[i]) <= 1e-4, f"step {i}"
    plain = expected_steps(unet, golden_call(), {}, **scales)
    assert not skips or distance(expected[-1], plain[-1]) > 1e-3


@pytest.mark.parametrize("high", [1.0, 3.0])
def test_every_step_of_the_twin_layout(opened: Open, unet: Any, high: float) -> None:
    skips: Skips = {"skip": (1.0, "stg-r", [5])}
    expected = expected_steps(unet, golden_call(), skips, high=high)
    steps = steps_of(opened("twin"), **given(golden_call()), **guidance(skips, high=high))
    for i, latents in enumerate(steps):
        assert distance(latents, expected[i]) <= 1e-4, f"step {i}"


def test_the_twin_layout_has_one_skip_pass(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="stg_blocks: expected one skip pass for the twin layout, got"):
        build(SVD, tmp_path, **SIZES, layout="twin")
    with pytest.raises(EngineRejected, match="the twin layout has one skip pass, the request has 2"):
        steps_of(opened("twin"), **given(golden_call()), **guidance(BOTH))


def test_two_videos_equal_one_by_one(opened: Open) -> None:
    first = golden_call()
    second = Call(first.image_embeddings.flip(2), first.image_latents.flip(3), first.latents.flip(1))
    both = Call(
        torch.cat([first.image_embeddings, second.image_embeddings]),
        torch.cat([first.image_latents, second.image_latents]),
        torch.cat([first.latents, second.latents]),
    )
    pipeline, options = opened("segmented"), guidance(BOTH)
    together = steps_of(pipeline, **given(both), **options)[-1]
    apart = torch.cat([steps_of(pipeline, **given(one), **options)[-1] for one in (first, second)])
    assert distance(apart[:1], apart[1:]) > 1e-2
    assert distance(together, apart) <= 1e-5
    # One picture, of which both videos are made.
    shared = given(both) | {"image_embeddings": first.image_embeddings, "image_latents": first.image_latents}
    same = steps_of(pipeline, **shared | {"num_videos_per_prompt": 2}, **options)[-1]
    assert distance(same[:1], apart[:1]) <= 1e-5


def test_a_call_leaves_nothing_behind(opened: Open) -> None:
    pipeline, call = opened("segmented"), given(golden_call())
    first = steps_of(pipeline, **call, **guidance(BOTH))
    steps_of(pipeline, **call, **guidance({}, low=0.5, high=0.5), motion_bucket_id=20, fps=12)
    again = steps_of(pipeline, **call, **guidance(BOTH))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def picture(seed: int = 0, size: tuple[int, int] = (80, 48)) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


OPTIONS = {"fps": 12, "motion_bucket_id": 60, "noise_aug_strength": 0.1, "decode_chunk_size": 3}


@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["defaults", "options"])
def test_frames_are_those_of_diffusers(
    opened: Open, checkpoint: Path, options: dict[str, Any], videos: int
) -> None:
    """From a picture of another aspect ratio, with one generator for its noise and that of the videos."""
    if options and videos == 2:
        # diffusers decodes frames of two videos as if they followed each other.
        options = options | {"decode_chunk_size": 2}
    call: dict[str, Any] = {
        **SIZES, "image": picture(), "num_inference_steps": 2, "num_videos_per_prompt": videos, **options,
    }  # fmt: skip
    expected = diffusers_pipeline(checkpoint)(**call, generator=seeded(), output_type="pt").frames
    frames = opened("segmented")(**call, generator=seeded(), stg_scale=0.0, output_type="pt").frames
    assert frames.shape == expected.shape == (videos, 4, 3, 64, 64)
    # The VAE's decoder sees latents that differ by rounding.
    assert (frames - expected).abs().max() <= 1e-4
    assert videos == 1 or (frames[0] - frames[1]).abs().max() > 1e-2


def test_pictures_in_any_form_and_one_for_each_video(opened: Open, checkpoint: Path) -> None:
    pipeline = opened("segmented")
    call: dict[str, Any] = {"num_inference_steps": 1, "stg_scale": 0.0, "output_type": "latent"}
    # Of the size of the video, so that nothing is resized twice.
    pictures = [picture(1, (64, 64)), picture(2, (64, 64))]
    both = pipeline(image=pictures, generator=[seeded(1), seeded(2)], **call).frames
    for i, one in enumerate(pictures):
        pixels = np.asarray(one).astype(np.float32) / 255
        for form in (one, pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
            alone = pipeline(image=form, generator=seeded(i + 1), **call).frames
            assert distance(alone, both[i : i + 1]) <= 1e-5
    # Each picture's noise is drawn once, whatever the number of its videos.
    own = diffusers_pipeline(checkpoint)(
        pictures, **SIZES, num_inference_steps=1, generator=seeded(), output_type="latent"
    ).frames
    # diffusers subtracts latents of sigma 700 from each other in its last step.
    assert distance(pipeline(image=pictures, generator=seeded(), **call).frames, own) <= 1e-4


def test_inspect_shows_every_skip_pass(opened: Open) -> None:
    (segmented,) = [b for b in opened("segmented").store.builds if b.manifest.layout == "segmented"]
    described = describe(segmented)
    states = described["guidance_states"]
    assert list(states) == ["cond", "cfg", "cfg+spatial", "cfg+temporal", "cfg+stg"]
    assert states["cfg+stg"]["rows"] == {
        "front": 2, "block_0": 3, "mid_1_3": 3, "block_4": 3, "block_5": 4, "back": 4,
    }  # fmt: skip
    assert states["cfg+temporal"]["rows"]["block_4"] == 2
    assert all(state["flops"] <= state["flops_full"] for state in states.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "a fox"}, "prompt: expected none for a model that makes its video from a picture alone"),
        ({"prompt_embeds": torch.zeros(1, 9, 24)}, "prompt: expected none for a model that makes its video"),
        ({"guidance_scale": 3.0}, "guidance_scale: expected min_guidance_scale and max_guidance_scale"),
        ({"image": picture()}, "image: expected a picture, or image_embeddings and image_latents, got both"),
        ({"image_latents": None}, "image_latents: expected it beside what else the svd checkpoint"),
        ({"image_embeddings": None}, "image_embeddings: expected it beside what else the svd check"),
        ({"image_embeddings": torch.zeros(1, 1, 9)}, r"image_embeddings: expected \(1, 1, 24\) for 64x64"),
        ({"image_latents": torch.zeros(1, 4, 9, 8)}, r"image_latents: expected \(1, 4, 8, 8\) for 64x64"),
        ({"image_latents": torch.full((1, 4, 8, 8), torch.nan)}, "image_latents: expected finite numbers"),
        ({"fps": 7, "frame_rate": 8.0}, "fps: expected frame_rate under one name, got two: leave fps out"),
        ({"last_image": picture()}, "last_image: expected a picture, or image_embeddings and"),
        ({"max_sequence_length": 77}, "max_sequence_length: expected 0, the text tokens of these engines"),
    ],
)  # fmt: skip
def test_calls_that_are_refused(opened: Open, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as refused:
        opened("segmented")(**given(golden_call()) | changes, output_type="latent")
    assert "\n" not in str(refused.value)


def test_a_call_without_a_picture(opened: Open) -> None:
    with pytest.raises(InvalidRequest, match="image: expected a picture, from which this svd checkpoint"):
        opened("segmented")()
    with pytest.raises(InvalidRequest, match="decode_chunk_size: expected a positive number of frames"):
        opened("segmented")(**given(golden_call()), decode_chunk_size=0, stg_scale=0.0)


def test_a_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="lora: expected none for svd, of whose layers diffusers merges"):
        build(SVD, tmp_path, **SIZES, lora=["lora.safetensors"])


def test_the_command_line_makes_the_same_call(
    opened: Open, svd_engines: Path, checkpoint: Path, tmp_path: Path
) -> None:
    image, output = tmp_path / "picture.png", tmp_path / "x.safetensors"
    picture().save(image)
    generate(
        str(checkpoint), svd_engines, output, image=image, seed=3, num_inference_steps=2, frame_rate=9.0,
        motion_bucket_id=30, noise_aug_strength=0.1, min_guidance_scale=1.5, max_guidance_scale=2.0,
        stg_scale=["spatial=1", "temporal=0.5"], layout="segmented",
    )  # fmt: skip
    again = opened("segmented")(
        image=picture(), generator=seeded(3), num_inference_steps=2, fps=9, motion_bucket_id=30,
        noise_aug_strength=0.1, min_guidance_scale=1.5, max_guidance_scale=2.0,
        stg_scale={"spatial": 1.0, "temporal": 0.5}, output_type="latent",
    ).frames  # fmt: skip
    assert load_file(output)["latents"].equal(again)
    with pytest.raises(InvalidRequest, match="prompt: expected none for a model that makes its video from a"):
        generate(str(checkpoint), svd_engines, output, image=image, prompt=["a fox"])
