"""Pictures: the goldens of image-to-video, and diffusers' own pipelines on other tiny checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from stg_trt import VideoPipeline, build
from stg_trt.errors import InvalidRequest
from stg_trt.models.segment import LAYOUTS
from tests.conftest import BuiltOnce
from tests.support.family_cases import CASES as FAMILIES
from tests.support.family_cases.case import GOLDENS
from tests.support.tiny_image_to_video import cogvideox_1_5, wan_first_last

HUNYUAN = ("hunyuan_video_i2v_token_replace", "hunyuan_video_i2v_latent_concat")
FOLDERS = ("cogvideox_5b_i2v", "wan2.1_i2v", *HUNYUAN)
CASES = [(folder, "stg_r") for folder in FOLDERS] + [(folder, "cfg") for folder in FOLDERS[:2]]
EMBEDS = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds", "negative_prompt_embeds")
SCALES = ("guidance_scale", "true_cfg_scale", "stg_scale")
OWN: dict[str, Callable[[Path], Any]] = {"cogvideox_1_5": cogvideox_1_5, "wan_first_last": wan_first_last}
Open = Callable[[str, str], VideoPipeline]

SLOW_FIXTURES = {"opened": "builds the engines of image-to-video models"}


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(folder: str, name: str = "image.png") -> Image.Image:
    return Image.open(GOLDENS / folder / name)


@cache
def golden(folder: str, case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    given: dict[str, Any] = json.loads((GOLDENS / folder / f"{case}.json").read_text())
    return given, load_file(GOLDENS / folder / f"{case}.safetensors")


def arguments(folder: str, case: str) -> dict[str, Any]:
    """A golden's call in VideoPipeline's names."""
    given, tensors = golden(folder, case)
    return {
        "image": picture(folder),
        "generator": seeded(),
        **{name: tensors[name] for name in EMBEDS if name in tensors},
        **{name: given[name] for name in ("num_inference_steps", *SCALES) if name in given},
        "stg_blocks": given["stg_applied_layers_idx"],
        "stg_mode": "stg-r",
        "output_type": "latent",
    }


def steps_of(pipeline: VideoPipeline, **call: Any) -> list[Tensor]:
    steps: list[Tensor] = []

    def keep(pipe: Any, index: int, timestep: float, tensors: dict[str, Tensor]) -> None:
        steps.append(tensors["latents"].clone())

    pipeline(**call, callback_on_step_end=keep)
    return steps


@pytest.fixture(scope="module")
def opened(built_once: BuiltOnce) -> Open:
    """The pipeline of a golden's folder, in a layout."""

    def fill(folder: str, engines: Path) -> None:
        given, tensors = golden(folder, "stg_r")
        for layout in LAYOUTS:
            build(
                GOLDENS / folder,
                engines,
                height=given["height"],
                width=given["width"],
                num_frames=given["num_frames"],
                text_length=tensors["prompt_embeds"].shape[1],
                stg_blocks=given["stg_applied_layers_idx"],
                stg_mode="stg-r",
                layout=layout,
                max_batch=2,
                verify_timesteps=1,
            )

    @cache
    def pipeline(folder: str, layout: str) -> VideoPipeline:
        engines = built_once(f"{folder}-engines", lambda where: fill(folder, where))
        return VideoPipeline.from_pretrained(GOLDENS / folder, engines, layout=layout)

    return pipeline


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("folder", "case"), CASES)
def test_every_step_of_the_goldens(opened: Open, folder: str, case: str, layout: str) -> None:
    expected = golden(folder, case)[1]
    steps = steps_of(opened(folder, layout), **arguments(folder, case))
    assert len(steps) == sum(name.startswith("expected_step_") for name in expected)
    for i, latents in enumerate(steps):
        assert (latents - expected[f"expected_step_{i:02d}"]).abs().max() <= 1e-4, f"step {i}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_two_videos_equal_one_by_one(opened: Open, folder: str) -> None:
    pipeline, first = opened(folder, "segmented"), arguments(folder, "stg_r")
    pictures = [picture(folder), picture(folder).rotate(180)]
    second = first | {"prompt_embeds": first["prompt_embeds"] * 0.5, "image": pictures[1]}
    both = {name: torch.cat([first[name], second[name]]) for name in EMBEDS if name in first}
    together = pipeline(**first | both | {"image": pictures, "generator": [seeded(1), seeded(2)]}).frames
    apart = [pipeline(**one | {"generator": seeded(i)}).frames for i, one in ((1, first), (2, second))]
    assert not torch.allclose(apart[0], apart[1], atol=1e-2)
    assert (together - torch.cat(apart)).abs().max() <= 1e-5


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_call_leaves_nothing_behind(opened: Open, folder: str) -> None:
    pipeline, call = opened(folder, "segmented"), arguments(folder, "stg_r")
    first = pipeline(**call).frames
    other = pipeline(**call | {"image": picture(folder).rotate(180), "generator": seeded()}).frames
    assert not torch.allclose(first, other, atol=1e-3)
    assert torch.equal(pipeline(**call | {"generator": seeded()}).frames, first)


@pytest.mark.parametrize("folder", HUNYUAN)
def test_true_cfg_and_frames_are_those_of_diffusers(opened: Open, folder: str) -> None:
    """Without the four frames of the first latent, where the picture has channels of its own."""
    call = arguments(folder, "stg_r") | {"true_cfg_scale": 2.0, "output_type": "np"}
    for name in EMBEDS[:3]:
        call[f"negative_{name}"] = call[name] if "mask" in name else call[name].flip(-1)
    own = HunyuanVideoImageToVideoPipeline.from_pretrained(
        GOLDENS / folder,
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_processor")),
    )
    own.set_progress_bar_config(disable=True)
    given = golden(folder, "stg_r")[0]
    sizes = {name: given[name] for name in ("height", "width", "num_frames")}
    theirs = {name: value for name, value in call.items() if not name.startswith("stg")}
    expected = own(**sizes, **theirs | {"generator": seeded()}).frames
    frames = opened(folder, "segmented")(**call | {"stg_scale": 0.0}).frames
    assert frames.shape == expected.shape == (1, 5 if "concat" in folder else 9, 48, 64, 3)
    assert np.abs(frames - expected).max() <= 1e-3


def test_the_guidance_of_image_to_video_is_that_of_its_pipeline(opened: Open) -> None:
    pipeline, call = opened(HUNYUAN[0], "segmented"), arguments(HUNYUAN[0], "stg_r")
    left_out = {name: value for name, value in call.items() if name != "guidance_scale"}
    frames = pipeline(**left_out).frames
    assert torch.equal(pipeline(**call | {"guidance_scale": 1.0, "generator": seeded()}).frames, frames)
    assert not torch.equal(pipeline(**call | {"generator": seeded()}).frames, frames)


def test_a_text_needs_a_text_encoder(opened: Open) -> None:
    told = refuse(opened(HUNYUAN[0], "segmented"), image=picture(HUNYUAN[0]), prompt="a fox")
    assert told.startswith("checkpoint: expected a text encoder that model_index.json names, got none in hun")


@pytest.mark.slow(reason="exports graphs of its own")
@pytest.mark.parametrize("kind", OWN)
def test_latents_are_those_of_diffusers(built_once: BuiltOnce, tmp_path: Path, kind: str) -> None:
    """CogVideoX 1.5 has an input `ofs` and patches in time; Wan's first and last picture have positions."""
    own = OWN[kind](tmp_path)
    height, width = 48, 64
    sizes: dict[str, Any] = {"height": height, "width": width, "num_frames": 9}
    tokens = 512 if kind.startswith("wan") else 9
    build(tmp_path, tmp_path / "engines", **sizes, text_length=tokens, stg_blocks=[1], verify_timesteps=1)
    pipeline = VideoPipeline.from_pretrained(tmp_path, tmp_path / "engines")
    embeds = torch.randn(2, 1, tokens, 24, generator=seeded(3))
    random = np.random.default_rng(0)
    names = pipeline.family.needed_images
    pictures = {
        name: Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)) for name in names
    }
    call: dict[str, Any] = {
        **sizes,
        **pictures,
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "guidance_scale": 4.0,
        "num_inference_steps": 3,
        "output_type": "latent",
    }
    expected = own(**call, generator=seeded(), max_sequence_length=tokens).frames
    got = pipeline(**call, stg_scale=0.0, rescale=0.0, generator=seeded()).frames
    assert names == (("image", "last_image") if kind == "wan_first_last" else ("image",))
    assert (got - expected).abs().max() <= 1e-4


def test_a_picture_may_be_a_file_an_array_or_a_tensor(opened: Open, tmp_path: Path) -> None:
    folder = FOLDERS[0]
    pipeline, call = opened(folder, "segmented"), arguments(folder, "cfg") | {"num_inference_steps": 1}
    array = np.asarray(picture(folder).convert("RGB"))
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    # Held upside down, as the file says.
    exif[0x0112] = 3
    whole = Image.new("RGB", (64, 48), (200, 30, 90))
    whole.paste((0, 0, 255), (0, 0, 32, 24))
    whole.rotate(180).save(turned, exif=exif, quality=100, subsampling=0)
    same: list[Any] = [
        GOLDENS / folder / "image.png",
        str(GOLDENS / folder / "image.png"),
        array,
        [picture(folder)],
    ]
    expected = pipeline(**call).frames
    for given in same:
        assert torch.equal(pipeline(**call | {"image": given, "generator": seeded()}).frames, expected)
    pixels = torch.from_numpy(array.copy()).permute(2, 0, 1) / 255
    resized = pipeline(**call | {"image": picture(folder).resize((64, 48)), "generator": seeded()}).frames
    assert array.shape == (48, 64, 3)
    from_tensor = pipeline(**call | {"image": pixels, "generator": seeded()}).frames
    assert torch.allclose(from_tensor, resized, atol=1e-5)
    straight = pipeline(**call | {"image": whole, "generator": seeded()}).frames
    from_file = pipeline(**call | {"image": turned, "generator": seeded()}).frames
    assert (straight - from_file).abs().mean() < 0.05


def refuse(pipeline: VideoPipeline, **call: Any) -> str:
    with pytest.raises(InvalidRequest) as refused:
        pipeline(**call)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_pictures_that_cannot_be(opened: Open, tmp_path: Path) -> None:
    pipeline, call = opened("wan2.1_i2v", "segmented"), arguments("wan2.1_i2v", "cfg")
    missing = refuse(pipeline, **call | {"image": None})
    assert missing.startswith("image: expected a picture, from which this wan2.1 checkpoint makes its video")
    last = refuse(pipeline, **call | {"last_image": call["image"]})
    assert last.startswith("last_image: expected none, for which this wan2.1 checkpoint was not trained")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    assert refuse(pipeline, **call | {"image": text}).startswith(f"image: expected a picture, got {text} (")
    nowhere = tmp_path / "nowhere.png"
    assert "No such file" in refuse(pipeline, **call | {"image": nowhere})
    assert "got int: convert it" in refuse(pipeline, **call | {"image": 3})
    assert "got Tensor (3, 4): convert it" in refuse(pipeline, **call | {"image": torch.zeros(3, 4)})
    many = refuse(pipeline, **call | {"image": [call["image"]] * 2})
    assert many == "image: expected one picture or 1, got 2: give one per prompt"
    bomb = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(bomb)
    huge = refuse(pipeline, **call | {"image": bomb})
    assert huge.startswith("image: expected at most 89478485 pixels, got more in ")


def test_a_size_other_than_that_of_learned_positions(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="height: expected 48, the size of the learned"):
        build(GOLDENS / "cogvideox_5b_i2v", tmp_path, height=64, width=64, num_frames=9, text_length=9)


def test_the_text_beside_pictures_has_one_length(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="text_length: expected 512, the only one that diffusers' Wan"):
        build(GOLDENS / "wan2.1_i2v", tmp_path, height=48, width=64, num_frames=9, text_length=9)


@pytest.mark.slow(reason="builds the engines of a family besides LTX-Video")
def test_a_picture_for_text_to_video(
    golden_engines: Callable[[Any], Path],
) -> None:
    case = next(case for case in FAMILIES if not case.family.optional_images)
    pipeline = VideoPipeline.from_pretrained(case.goldens, golden_engines(case))
    told = refuse(pipeline, prompt="a", image=Image.new("RGB", (8, 8)))
    assert told.startswith("image: expected none, for which this ")
