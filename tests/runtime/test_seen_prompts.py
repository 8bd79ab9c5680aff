"""Prompts that HunyuanVideo-I2V's text encoder reads together with the picture, as diffusers' pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoImageToVideoPipeline
from PIL import Image

from stg_trt import VideoPipeline, build
from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.image import Images
from stg_trt.models.workload import Workload
from stg_trt.runtime.components import Components
from tests.conftest import BuiltOnce
from tests.support.family_cases.hunyuan_video import make_text_encoder, make_tokenizer
from tests.support.tiny_seen_prompts import CHANNELS, checkpoint, words_of

SIZES: dict[str, Any] = {"height": 48, "width": 64, "num_frames": 9}
# Room for 16 tokens beside the 288 of a picture, of which the pipeline cuts out 4.
TEXT_LENGTH, ROOM = 300, 16
CPU = torch.device("cpu")
Open = Callable[[str], VideoPipeline]

SLOW_FIXTURES = {"opened": "builds the engines of HunyuanVideo for pictures"}


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (72, 96, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def folder(kind: str) -> Path:
        saved = tmp_path_factory.mktemp(kind)
        checkpoint(saved, kind)
        return saved

    return folder


@pytest.fixture(scope="module")
def opened(folders: Callable[[str], Path], built_once: BuiltOnce) -> Open:
    def fill(kind: str, engines: Path) -> None:
        sizes = {**SIZES, "text_length": TEXT_LENGTH, "max_batch": 2, "verify_timesteps": 1}
        build(folders(kind), engines, **sizes, stg_blocks=[1])

    @cache
    def pipeline(kind: str) -> VideoPipeline:
        engines = built_once(f"seen-{kind}-engines", lambda where: fill(kind, where))
        return VideoPipeline.from_pretrained(folders(kind), engines)

    return pipeline


def of_diffusers(folder: Path) -> Any:
    pipeline = HunyuanVideoImageToVideoPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(**changes: Any) -> dict[str, Any]:
    return {
        **SIZES,
        "image": picture(),
        "prompt": "a red circle",
        "num_inference_steps": 3,
        "output_type": "latent",
        "max_sequence_length": ROOM,
        "generator": seeded(),
        **changes,
    }


@pytest.mark.parametrize("kind", CHANNELS)
@pytest.mark.parametrize("negative", [False, True])
def test_embeddings_are_those_of_diffusers(folders: Callable[[str], Path], kind: str, negative: bool) -> None:
    """A negative prompt sees black, and half of its tokens in both kinds."""
    opened = Checkpoint.open(folders(kind))
    workload = Workload(**SIZES, text_length=TEXT_LENGTH)
    prompts = ["a red circle moving left", "blue"]
    shown = [picture(1), picture(2)]
    got = Components(opened, None, offload=False).encode(
        prompts, workload, CPU, "negative_" if negative else "", Images(shown)
    )
    for row, (prompt, seen) in enumerate(zip(prompts, shown, strict=True)):
        with torch.no_grad():
            embeds, pooled, mask = of_diffusers(folders(kind)).encode_prompt(
                Image.new("RGB", (64, 48)) if negative else seen,
                prompt,
                max_sequence_length=ROOM,
                image_embed_interleave=4 if kind == "token_replace" and not negative else 2,
            )
        tokens = mask.shape[1]
        assert tokens == (156 if kind == "token_replace" and not negative else TEXT_LENGTH)
        assert (got.embeds[row, :tokens] - embeds[0]).abs().max() <= 1e-5
        assert got.pooled is not None and (got.pooled[row] - pooled[0]).abs().max() <= 1e-5
        assert torch.equal(got.mask[row, :tokens].long(), mask[0]) and not got.mask[row, tokens:].any()


@pytest.mark.parametrize("kind", CHANNELS)
@pytest.mark.parametrize("true_cfg_scale", [1.0, 3.0])
def test_a_prompt_makes_the_video_of_diffusers(
    folders: Callable[[str], Path], opened: Open, kind: str, true_cfg_scale: float
) -> None:
    """Whose tokens of the picture and of the text are fewer than those of the engines."""
    given = call(true_cfg_scale=true_cfg_scale, negative_prompt="blurred")
    expected = of_diffusers(folders(kind))(**given).frames
    got = opened(kind)(**given | {"generator": seeded()}, stg_scale=0.0).frames
    assert (got - expected).abs().max() <= 1e-4
    other = opened(kind)(**given | {"generator": seeded(), "prompt": "blue"}, stg_scale=0.0).frames
    assert (got - other).abs().max() > 1e-3


def test_two_videos_equal_one_by_one(opened: Open) -> None:
    prompts, shown = ["a red circle moving left", "blue <|end_header_id|>"], [picture(1), picture(2)]
    both = call(prompt=prompts, image=shown, generator=[seeded(1), seeded(2)])
    together = opened("token_replace")(**both).frames
    apart = [
        opened("token_replace")(**call(prompt=prompt, image=seen, generator=seeded(seed))).frames
        for prompt, seen, seed in zip(prompts, shown, (1, 2), strict=True)
    ]
    assert (together - torch.cat(apart)).abs().max() <= 1e-5
    one_picture = opened("token_replace")(**both | {"image": shown[0], "generator": [seeded(1), seeded(2)]})
    assert torch.allclose(one_picture.frames[0], together[0], atol=1e-5)
    assert not torch.allclose(one_picture.frames[1], together[1], atol=1e-3)


def refused(pipeline: VideoPipeline, **changes: Any) -> str:
    with pytest.raises(InvalidRequest) as error:
        pipeline(**call(**changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_prompts_have_room_beside_the_picture(opened: Open) -> None:
    pipeline = opened("token_replace")
    text = pipeline.components.load_text(Workload(**SIZES, text_length=TEXT_LENGTH), CPU)
    pipeline(**call(prompt=words_of(text, ROOM)))
    told = refused(pipeline, prompt=words_of(text, ROOM + 3))
    assert told == (
        "prompt: expected at most 16 tokens, got 19: shorten it or rebuild with --text-length 303"
    )
    told = refused(pipeline, max_sequence_length=256)
    assert told == (
        "max_sequence_length: expected 16, the text tokens of these engines, got 256: leave it out, or build "
        "with --text-length 540"
    )
    for kind in ("hunyuan-video-i2v", "hunyuan-video-i2v-33ch"):
        assert Checkpoint.open(kind, random_weights=True).family.defaults.text_length == 540


def without(folder: Path, part: str, into: Path) -> Path:
    """A copy of a checkpoint without one of its parts."""
    shutil.copytree(folder, into)
    shutil.rmtree(into / part)
    return into


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("image_processor", "checkpoint: expected image_processor/, which sees the picture, got none in"),
        ("text_encoder", "checkpoint: expected text_encoder/ in "),
        ("text_encoder_2", "checkpoint: expected text_encoder_2/ in "),
        ("tokenizer", "checkpoint: expected tokenizer/ in "),
    ],
)
def test_a_part_is_missing(
    folders: Callable[[str], Path], opened: Open, tmp_path: Path, part: str, told: str
) -> None:
    folder = without(folders("token_replace"), part, tmp_path / "less")
    assert refused(VideoPipeline(Checkpoint.open(folder), opened("token_replace").store)).startswith(told)


def test_a_text_encoder_that_sees_nothing(
    folders: Callable[[str], Path], opened: Open, tmp_path: Path
) -> None:
    """As a text-to-video checkpoint has, and a tokenizer that knows no picture."""
    folder, store = (
        without(folders("token_replace"), "tokenizer", tmp_path / "mixed"),
        opened("token_replace"),
    )
    make_tokenizer(["<image>"], ["<|eot_id|>"]).save_pretrained(folder / "tokenizer")
    told = refused(VideoPipeline(Checkpoint.open(folder), store.store))
    assert told.startswith("checkpoint: expected a tokenizer/ that writes the picture's token 76 at place 5")
    make_text_encoder(200).save_pretrained(folder / "text_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "LlamaModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    told = refused(VideoPipeline(Checkpoint.open(folder), store.store))
    assert told.startswith("checkpoint: expected a text_encoder/ that sees pictures, such as Llava")
