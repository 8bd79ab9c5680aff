"""Pictures as clean latents: LTX-Video's goldens, and diffusers' own pipelines under several conditions."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import LTXConditionPipeline, LTXImageToVideoPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from stg_trt import VideoPipeline, build
from stg_trt.errors import EngineRejected, InvalidRequest
from stg_trt.models.families.token_timesteps import timestep_tables
from stg_trt.models.image import FrameCondition
from stg_trt.models.segment import LAYOUTS
from stg_trt.runtime.command_arguments import read_conditions
from stg_trt.runtime.device import Device
from stg_trt.runtime.video_file import save_video
from tests.conftest import BuiltOnce, OnTwoRanks
from tests.support.family_cases.case import GOLDENS
from tests.support.simulated_cuda import SimulatedCuda, SimulatedGpu

SIZES: dict[str, Any] = {"height": 128, "width": 160, "num_frames": 17}
CASES = [
    ("ltx_i2v", "cfg"),
    ("ltx_i2v", "stg_a"),
    ("ltx_condition", "cfg_image"),
    ("ltx_condition", "stg_a_image"),
]
EMBEDS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_attention_mask",
)
Open = Callable[..., VideoPipeline]

SLOW_FIXTURES = {"opened": "builds engines with room for clean latents"}


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(name: str = "image.png") -> Image.Image:
    return Image.open(GOLDENS / "ltx_condition" / name)


def moving(frames: int) -> list[Image.Image]:
    small = picture().convert("RGB").resize((SIZES["width"], SIZES["height"]))
    return [small.rotate(3 * frame) for frame in range(frames)]


@cache
def tensors_of(folder: str, case: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(GOLDENS / folder / f"{case}.safetensors")
    return tensors


def arguments(folder: str = "ltx_condition", case: str = "cfg_image", **changes: Any) -> dict[str, Any]:
    """A golden's call in VideoPipeline's names."""
    given = json.loads((GOLDENS / folder / f"{case}.json").read_text())
    stg = {"stg_scale": given["stg_scale"], "stg_blocks": given["stg_applied_layers_idx"], "rescale": 0.0}
    condition = {"image": picture(), "frame_index": 0, "strength": 1.0}
    shown: dict[str, Any] = {"conditions": [condition], "image_cond_noise_scale": 0.0}
    return {
        **SIZES,
        **{name: tensors_of(folder, case)[name] for name in EMBEDS},
        **{name: given[name] for name in ("frame_rate", "num_inference_steps", "guidance_scale")},
        **(stg if given["stg_scale"] else {"stg_scale": 0.0, "rescale": 0.0}),
        **(shown if folder == "ltx_condition" else {"image": picture()}),
        "generator": seeded(),
        "output_type": "latent",
        **changes,
    }


def steps_of(pipeline: Any, **call: Any) -> list[Tensor]:
    steps: list[Tensor] = []

    def keep(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(tensors["latents"].clone())
        return {}

    pipeline(**call, callback_on_step_end=keep)
    return steps


def assert_steps_of_diffusers(pipeline: VideoPipeline, theirs: Any, call: dict[str, Any]) -> None:
    own = {name: value for name, value in call.items() if name not in ("stg_scale", "rescale")}
    expected = steps_of(theirs, **own | {"generator": seeded()})
    got = steps_of(pipeline, **call)
    assert len(got) == len(expected) == 4
    for i, (ours, of_diffusers) in enumerate(zip(got, expected, strict=True)):
        assert (ours - of_diffusers).abs().max() <= 1e-4, f"step {i}"


@pytest.fixture(scope="module")
def opened(built_once: BuiltOnce) -> Open:
    """The pipeline of a golden's folder, in a layout; engines with room for none to two latent frames."""

    def fill(folder: str, engines: Path) -> None:
        built = {**SIZES, "text_length": 9, "stg_blocks": [3], "max_batch": 2, "verify_timesteps": 1}
        for layout in LAYOUTS:
            build(GOLDENS / folder, engines, **built, layout=layout)
        for frames in (1, 2) if folder == "ltx_condition" else ():
            build(GOLDENS / folder, engines, **built, condition_frames=frames)

    def pipeline(folder: str = "ltx_condition", layout: str = "segmented") -> VideoPipeline:
        engines = built_once(f"{folder}-engines", lambda where: fill(folder, where))
        return VideoPipeline.from_pretrained(GOLDENS / folder, engines, layout=layout)

    return cache(pipeline)


@pytest.fixture(scope="module")
def diffusers_pipeline() -> Any:
    pipeline = LTXConditionPipeline.from_pretrained(
        GOLDENS / "ltx_condition", text_encoder=None, tokenizer=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("folder", "case"), CASES)
def test_every_step_of_the_goldens(opened: Open, folder: str, case: str, layout: str) -> None:
    expected = tensors_of(folder, case)
    steps = steps_of(opened(folder, layout), **arguments(folder, case))
    assert len(steps) == sum(name.startswith("expected_step_") for name in expected) == 4
    for i, latents in enumerate(steps):
        assert (latents - expected[f"expected_step_{i:02d}"]).abs().max() <= 1e-4, f"step {i}"
    latents = opened(folder, layout)(**arguments(folder, case)).frames
    assert (latents - expected["expected_latents"]).abs().max() <= 1e-4


CONDITIONS: dict[str, list[LTXVideoCondition]] = {
    "a weak picture": [LTXVideoCondition(image=picture(), strength=0.2)],
    "first and last": [
        LTXVideoCondition(image=picture()),
        LTXVideoCondition(image=picture("image_2.png"), frame_index=16, strength=0.7),
    ],
    "a picture over a video": [
        LTXVideoCondition(video=moving(12)),
        LTXVideoCondition(image=picture("image_2.png"), strength=0.4),
    ],
    "a later video": [LTXVideoCondition(video=moving(30), frame_index=8, strength=0.9)],
}


@pytest.mark.parametrize("noise", [0.0, 0.15])
@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions_are_those_of_diffusers(
    opened: Open, diffusers_pipeline: Any, name: str, noise: float
) -> None:
    """Places in time, strengths, the order of what is drawn, and noise on clean latents."""
    call = arguments(conditions=CONDITIONS[name], image_cond_noise_scale=noise)
    assert_steps_of_diffusers(opened(), diffusers_pipeline, call)


SHORT_FORMS: dict[str, dict[str, Any]] = {
    "a picture": {"image": picture()},
    "a weak later picture": {"image": picture(), "frame_index": 8, "strength": 0.6},
    "two pictures": {
        "image": [picture(), picture("image_2.png")],
        "video": [None, None],
        "frame_index": [0, 16],
        "strength": [1.0, 0.7],
    },
    "a picture and a video": {
        "image": [picture(), None],
        "video": [None, moving(12)],
        "frame_index": [0, 8],
        "strength": 0.8,
    },
    "two at one frame": {"image": [picture(), picture("image_2.png")], "video": [None] * 2, "strength": 0.4},
    "a video as an array": {"video": np.stack([np.asarray(frame) for frame in moving(9)]) / 255.0},
}


@pytest.mark.parametrize("name", SHORT_FORMS)
def test_the_short_form_is_that_of_diffusers(opened: Open, diffusers_pipeline: Any, name: str) -> None:
    call = arguments(**SHORT_FORMS[name], conditions=None)
    assert_steps_of_diffusers(opened(), diffusers_pipeline, call)


@pytest.mark.parametrize(
    ("short", "conditions"),
    [
        (
            {"image": [picture(), picture("image_2.png")], "frame_index": [0, 16]},
            [{"image": picture()}, {"image": picture("image_2.png"), "frame_index": 16}],
        ),
        ({"video": moving(12)}, [{"video": moving(12)}]),
        ({"video": [moving(12), moving(9)]}, [{"video": moving(12)}, {"video": moving(9)}]),
    ],
)
def test_every_picture_of_the_short_form_counts(
    opened: Open, short: dict[str, Any], conditions: list[dict[str, Any]]
) -> None:
    """Where diffusers 0.42 drops all but the first, or takes the first frame of a video for all of it."""
    assert torch.equal(
        opened()(**arguments(**short, conditions=None)).frames,
        opened()(**arguments(conditions=conditions)).frames,
    )


@pytest.mark.parametrize(
    ("short", "told"),
    [
        ({"image": picture(), "video": moving(9)}, "image: expected an image or a video for each condition,"),
        (
            {"image": [picture()] * 2, "video": [moving(9)]},
            "image: expected an image or a video for each con",
        ),
        ({"image": [None]}, "image: expected an image or a video for each condition, got 1 images and 0"),
        ({"image": []}, "image: expected an image or a video for each condition, got 0 images and 0 vi"),
        (
            {"image": [picture()] * 2, "frame_index": [0]},
            "frame_index: expected one number or 2, got 1: give",
        ),
        (
            {"image": [picture()] * 2, "strength": [1, 1, 1]},
            "strength: expected one number or 2, got 3: give",
        ),
        ({"image": picture(), "strength": 2}, "strength: expected a number from 0 to 1, got 2"),
        ({"video": "nowhere.mp4"}, "video: expected a video, got nowhere.mp4 (No such"),
        ({"frame_index": 8}, "frame_index: expected it beside image or video, got it without: add them, or"),
    ],
)
def test_short_forms_that_cannot_be(opened: Open, short: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        opened()(**arguments(**short, conditions=None))
    assert str(refused.value).startswith(told)
    assert "\n" not in str(refused.value)


def test_the_default_noise_is_that_of_diffusers(opened: Open) -> None:
    call = arguments(image_cond_noise_scale=None)
    latents = opened()(**call).frames
    assert torch.equal(opened()(**arguments(image_cond_noise_scale=0.15)).frames, latents)
    assert (opened()(**arguments()).frames - latents).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["a weak picture", "first and last"])
def test_two_videos_equal_one_by_one(opened: Open, name: str) -> None:
    """With a generator each, of which every video draws its own samples and noise."""
    first = arguments(case="stg_a_image", conditions=CONDITIONS[name], image_cond_noise_scale=0.15)
    second = first | {"prompt_embeds": first["prompt_embeds"] * 0.5}
    both = {name: torch.cat([first[name], second[name]]) for name in EMBEDS}
    together = opened()(**first | both | {"generator": [seeded(1), seeded(2)]}).frames
    apart = [opened()(**one | {"generator": [seeded(i)]}).frames for i, one in ((1, first), (2, second))]
    assert not torch.allclose(apart[0], apart[1], atol=1e-2)
    assert (together - torch.cat(apart)).abs().max() <= 1e-5


def test_two_pictures_equal_one_by_one(opened: Open) -> None:
    pipeline, call = opened("ltx_i2v"), arguments("ltx_i2v", "stg_a")
    pictures = [picture(), picture("image_2.png")]
    both = {name: torch.cat([call[name]] * 2) for name in EMBEDS}
    together = pipeline(**call | both | {"image": pictures, "generator": [seeded(1), seeded(2)]}).frames
    apart = [
        pipeline(**call | {"image": shown, "generator": [seeded(i + 1)]}).frames
        for i, shown in enumerate(pictures)
    ]
    assert not torch.allclose(apart[0], apart[1], atol=1e-2)
    assert (together - torch.cat(apart)).abs().max() <= 1e-5


def test_text_to_video_on_the_same_engines_knows_nothing_of_a_picture(opened: Open) -> None:
    pipeline = opened("ltx_i2v")
    plain = arguments("ltx_i2v", "stg_a", image=None)
    before = pipeline(**plain).frames
    animated = pipeline(**arguments("ltx_i2v", "stg_a")).frames
    assert (animated - before).abs().max() > 0.1
    assert torch.equal(pipeline(**plain | {"generator": seeded()}).frames, before)
    assert torch.equal(pipeline(**arguments("ltx_i2v", "stg_a")).frames, animated)


def test_given_latents_are_where_a_picture_starts(opened: Open) -> None:
    """LTXImageToVideoPipeline runs packed latents as they are; their first frame is kept."""
    latents = torch.randn(1, 60, 8, generator=seeded(5))
    call = arguments("ltx_i2v", "cfg", latents=latents)
    own = LTXImageToVideoPipeline.from_pretrained(GOLDENS / "ltx_i2v", text_encoder=None, tokenizer=None)
    own.set_progress_bar_config(disable=True)
    theirs = {name: v for name, v in call.items() if name not in ("stg_scale", "rescale")}
    got = opened("ltx_i2v")(**call | {"latents": latents.clone()}).frames
    assert (got - own(**theirs).frames).abs().max() <= 1e-4
    assert torch.equal(got[:, :20], latents[:, :20])


def test_a_callback_may_change_what_is_given(opened: Open) -> None:
    """As in diffusers, whose loop keeps the first frame of whatever the latents are."""
    changed = torch.randn(1, 20, 8, generator=seeded(4))

    def change(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["latents"][:, :20] = changed
        return tensors

    call = arguments("ltx_i2v", "cfg")
    latents = opened("ltx_i2v")(**call, callback_on_step_end=change).frames
    assert torch.equal(latents[:, :20], changed)


@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_a_captured_step_and_two_ranks_keep_them_too(
    opened: Open, on_two_ranks: OnTwoRanks, noise: float
) -> None:
    """A graph reads and writes the same memory in every step."""
    call = arguments(case="stg_a_image", image_cond_noise_scale=noise)
    expected = opened()(**call).frames
    pipeline = VideoPipeline.from_pretrained(GOLDENS / "ltx_condition", opened().store.root)
    device = SimulatedCuda(SimulatedGpu())
    pipeline._samplers._devices["cpu"] = cast("Device", device)
    for other in (pipeline, on_two_ranks(opened())):
        assert (other(**call | {"generator": seeded()}).frames - expected).abs().max() <= 1e-6


def test_files_and_dicts_are_conditions(opened: Open, tmp_path: Path) -> None:
    video = tmp_path / "moving.mp4"
    frames = torch.rand(9, 128, 160, 3, generator=seeded(1)).numpy()
    save_video(frames, video, 25.0)
    texts = [f"{GOLDENS / 'ltx_condition' / 'image.png'}@0:1", f"{video}@8:0.9"]
    read = read_conditions(texts)
    assert read is not None
    assert [sorted(one) for one in read] == [
        ["frame_index", "image", "strength"],
        ["frame_index", "strength", "video"],
    ]
    assert read[1] == {"video": str(video), "frame_index": 8, "strength": 0.9}
    latents = opened()(**arguments(conditions=read[:1])).frames
    assert torch.equal(opened()(**arguments()).frames, latents)
    assert torch.equal(opened()(**arguments(conditions=FrameCondition([picture()]))).frames, latents)
    assert torch.equal(
        opened()(**arguments(conditions=None, image=picture(), image_cond_noise_scale=0.0)).frames, latents
    )
    assert len(steps_of(opened(), **arguments(conditions=read[1:]))[0][0]) == 60 + 40
    with pytest.raises(InvalidRequest, match=r"condition: expected FILE@FRAME:STRENGTH, such as .*got 'a@b'"):
        read_conditions(["a@b"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"conditions": [{"image": picture(), "frame_index": 17}]}, "frame_index: expected 0 to 16, the fra"),
        (
            {"conditions": [{"image": picture(), "frame_index": -1}]},
            "frame_index: expected a frame number fr",
        ),
        ({"conditions": [{"image": picture(), "strength": 1.5}]}, "strength: expected a number from 0 to 1"),
        ({"conditions": [{"image": picture(), "strength": "1"}]}, "strength: expected a number from 0 to 1"),
        ({"conditions": [{"frame_index": 0}]}, "conditions: expected an image or a video with frame_index"),
        ({"conditions": [{"image": picture(), "frame": 0}]}, "conditions: expected an image or a video with"),
        (
            {"conditions": [{"video": "nowhere.mp4"}]},
            "conditions: expected a video, got nowhere.mp4 (No such",
        ),
        ({"conditions": [{"video": []}]}, "conditions: expected a video as a path or a sequence of pictures"),
        ({"image": picture()}, "conditions: expected image or conditions, got both: add the image to"),
        ({"video": moving(9)}, "conditions: expected image or conditions, got both: add the image to"),
        ({"strength": 0.5}, "strength: expected it beside image or video, got it without: add them, or wr"),
        ({"last_image": picture()}, "last_image: expected none, for which this ltx-video checkpoint"),
    ],
)
def test_conditions_that_cannot_be(opened: Open, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        opened()(**arguments(**changes))
    assert str(refused.value).startswith(told)
    assert "\n" not in str(refused.value)


def test_engines_without_room_for_a_later_picture(opened: Open) -> None:
    later = {"image": picture(), "frame_index": 8}
    with pytest.raises(EngineRejected, match="the request is 3: rebuild with --condition-frames 3"):
        opened()(**arguments(conditions=[later] * 3))


def test_a_checkpoint_for_the_first_frame_alone(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="conditions: expected none for this ltx-video checkpoint, who"):
        opened("ltx_i2v")(**arguments("ltx_i2v", "cfg", conditions=[{"image": picture()}]))
    with pytest.raises(InvalidRequest, match="condition_frames: expected 0 for LTXPipeline"):
        build(GOLDENS / "ltx_i2v", tmp_path, **SIZES, text_length=9, stg_blocks=[3], condition_frames=1)


def test_strengths_have_a_place_each() -> None:
    tables = timestep_tables(torch.tensor([0.0, 1.0, 0.25, 1.0]), 4)
    assert tables["timestep_limits"].tolist() == [torch.inf, 750.0, 0.0, torch.inf]
    assert tables["timestep_index"].tolist() == [0, 2, 1, 2]
    with pytest.raises(InvalidRequest, match="strength: expected at most 3 different ones in a call, got 4"):
        timestep_tables(torch.tensor([0.1, 0.2, 0.3, 0.4]), 4)
