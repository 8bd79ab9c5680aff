"""Calls as people copy them from diffusers: they mean the same here, or are refused before any work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from torch import Tensor

from stg_trt import VideoPipeline
from stg_trt.errors import InvalidRequest, NotFinite
from tests.support.family_cases import LTX, FamilyCase
from tests.support.whole_pipelines import (
    NEGATIVE,
    PROMPTS,
    STEPS,
    TEXT_LENGTH,
    call,
    cfg_of,
    loaded,
    of_diffusers,
    seeded,
)

# Dozens of calls of one model; what differs from family to family is tested on each of them.
ONE = pytest.mark.parametrize("case", [LTX], indirect=True, ids=str)
ENCODING: dict[str, Any] = {"do_classifier_free_guidance": False, "max_sequence_length": TEXT_LENGTH}
OFF: dict[str, Any] = {"stg_scale": 0.0, "rescale": 0.0, "output_type": "latent"}


@pytest.fixture
def given(case: FamilyCase, pipeline: VideoPipeline) -> Iterator[dict[str, Any]]:
    """A call of one prompt, without STG."""
    pipeline.scheduler = case.schedulers[0]
    yield call(case, pipeline, PROMPTS[:1])


def theirs(case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline, **given: Any) -> Any:
    return of_diffusers(case, checkpoint, pipeline.scheduler, "latent", **given)


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max())


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_there_is_no_cfg_at_one_and_below(
    case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline, given: dict[str, Any], scale: float
) -> None:
    given |= cfg_of(case, scale)
    expected = theirs(case, checkpoint, pipeline, **given, generator=seeded(5))
    assert distance(pipeline(**given, **OFF, generator=seeded(5)).frames, expected) <= 1e-4


@ONE
def test_steps_without_cfg(pipeline: VideoPipeline, given: dict[str, Any]) -> None:
    low, one = (
        pipeline(**given | {"guidance_scale": [4.0, 4.0, scale, scale]}, **OFF).frames for scale in (0.0, 1.0)
    )
    assert torch.equal(low, one)


@ONE
def test_embeddings_beside_texts(
    case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline, given: dict[str, Any]
) -> None:
    """Of either prompt, the other a text, or none as in diffusers."""
    own = loaded(case, checkpoint)
    cond, negative = (
        dict(
            zip(("prompt_embeds", "prompt_attention_mask"), own.encode_prompt(text, **ENCODING), strict=False)
        )
        for text in (PROMPTS[0], NEGATIVE)
    )
    negative = {f"negative_{name}": tensor for name, tensor in negative.items()}
    expected = theirs(case, checkpoint, pipeline, **given)
    without = {"negative_prompt": None} | negative
    assert distance(pipeline(**given | without, **OFF).frames, expected) <= 1e-4
    embedded = {"prompt": None} | cond
    assert distance(pipeline(**given | embedded, **OFF).frames, expected) <= 1e-4
    empty = theirs(case, checkpoint, pipeline, **given | {"negative_prompt": ""})
    assert distance(pipeline(**given | embedded | {"negative_prompt": None}, **OFF).frames, empty) <= 1e-4
    mask = cond["prompt_attention_mask"]
    spoilt = cond | {"prompt_embeds": cond["prompt_embeds"] * torch.nan}
    for wrong, message in (
        (negative, "negative_prompt: expected negative_prompt or negative_prompt_embeds, got both"),
        (cond, "prompt: expected prompt or prompt_embeds, got both"),
        ({"prompt_attention_mask": mask}, "prompt_attention_mask: expected it beside prompt_embeds"),
        ({"negative_prompt_attention_mask": mask}, "negative_prompt_attention_mask: expected it beside"),
        ({"prompt": None} | spoilt, "prompt_embeds: expected finite numbers"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            pipeline(**given | wrong)


def edit(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["latents"].mul_(0.9)
    return tensors


@ONE
def test_a_callback_edits_in_place(
    case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline, given: dict[str, Any]
) -> None:
    expected = theirs(case, checkpoint, pipeline, **given, callback_on_step_end=edit)
    got = pipeline(**given, **OFF, callback_on_step_end=edit, callback_on_step_end_tensor_inputs=["latents"])
    assert distance(got.frames, expected) <= 1e-4
    untouched = theirs(case, checkpoint, pipeline, **given)
    assert distance(expected, untouched) > 1e-2
    same = pipeline(**given, **OFF, callback_on_step_end=lambda pipe, i, t, tensors: tensors).frames
    assert distance(same, untouched) <= 1e-4


@ONE
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"latents": torch.zeros(1, 2, 3)}, r"expected latents \(1, .*, 8\) in return, got .*\(1, 2, 3\)"),
        ({"latents": 3}, "expected latents as a tensor in return, got int"),
        ({"latent": torch.zeros(1)}, "expected only latents in return, got latent:"),
        (torch.zeros(1), "expected a dict or None in return, got Tensor"),
    ],
)
def test_a_callback_answers_wrongly(
    pipeline: VideoPipeline, given: dict[str, Any], answer: Any, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"callback_on_step_end: {message}"):
        pipeline(**given, **OFF, callback_on_step_end=lambda *arguments: answer)


@ONE
def test_a_callback_stops_the_run(
    case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline, given: dict[str, Any]
) -> None:
    def stop(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = index == 1
        return tensors

    expected = theirs(case, checkpoint, pipeline, **given, callback_on_step_end=stop)
    assert distance(pipeline(**given, **OFF, callback_on_step_end=stop).frames, expected) <= 1e-4


@ONE
def test_a_callback_cannot_change_the_guidance(pipeline: VideoPipeline, given: dict[str, Any]) -> None:
    def change(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> None:
        pipe._guidance_scale = 1.5

    with pytest.raises(InvalidRequest, match=r"_guidance_scale: .* one value per step"):
        pipeline(**given, callback_on_step_end=change)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    with pytest.raises(InvalidRequest, match=r"wants prompt_embeds: .* one value per step"):
        pipeline(**given, callback_on_step_end=cutoff)
    with pytest.raises(InvalidRequest, match=r"wants prompt_embeds: .* one value per step"):
        pipeline(**given, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


@ONE
def test_threads_take_turns(pipeline: VideoPipeline, given: dict[str, Any]) -> None:
    noises = [given["latents"], given["latents"].flip(1)]
    alone = [pipeline(**given | {"latents": noise}, **OFF).frames for noise in noises]
    got: dict[int, Tensor] = {}

    def run(number: int) -> None:
        got[number] = pipeline(**given | {"latents": noises[number]}, **OFF).frames

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[number], alone[number]) for number in range(2))


@ONE
def test_a_call_inside_a_call_is_refused(pipeline: VideoPipeline, given: dict[str, Any]) -> None:
    expected = pipeline(**given, **OFF).frames

    def again(*arguments: Any) -> None:
        pipeline(**given)

    with pytest.raises(InvalidRequest, match="VideoPipeline: expected one call at a time, got a call from"):
        pipeline(**given, callback_on_step_end=again)
    assert torch.equal(pipeline(**given, **OFF).frames, expected)


@ONE
def test_inference_mode_makes_no_difference(pipeline: VideoPipeline, given: dict[str, Any]) -> None:
    fresh = VideoPipeline(pipeline.checkpoint, pipeline.store)
    with torch.inference_mode():
        inside = fresh(**given, **OFF).frames
    outside = fresh(**given, **OFF).frames
    assert torch.equal(inside, outside) and not inside.is_inference()


@ONE
def test_numbers_that_are_not_finite(pipeline: VideoPipeline, given: dict[str, Any]) -> None:
    def spoil(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] * torch.nan} if index == 1 else tensors

    with pytest.raises(NotFinite, match=f"latents: .*got NaN or infinity after step 3 of {STEPS}: check"):
        pipeline(**given, **OFF, callback_on_step_end=spoil)
    with pytest.raises(InvalidRequest, match="latents: expected finite numbers"):
        pipeline(**given | {"latents": given["latents"] / 0}, **OFF)


@ONE
def test_other_names_of_the_same(pipeline: VideoPipeline, given: dict[str, Any]) -> None:
    options: dict[str, Any] = {"output_type": "latent", "stg_scale": 1.5}
    expected = pipeline(**given, **options, stg_blocks=[1], rescale=0.7).frames
    for same in (
        {"stg_applied_layers_idx": [1], "do_rescaling": True},
        {"stg_blocks": 1, "guidance_rescale": 0.7},
        {"spatio_temporal_guidance_blocks": [1], "rescale": 0.7},
        {"stg_blocks": np.array([1]), "rescale": np.float32(0.7), "stg_scale": np.float64(1.5)},
        {
            "stg_blocks": (np.int64(1),),
            "rescale": 0.7,
            "max_sequence_length": TEXT_LENGTH,
            "return_dict": True,
        },
    ):
        assert distance(pipeline(**given, **options | same).frames, expected) <= 1e-6
    off = pipeline(**given, **options, stg_blocks=[1], rescale=0.0).frames
    assert torch.equal(pipeline(**given, **options, stg_blocks=[1], do_rescaling=False).frames, off)


@ONE
def test_a_tuple_of_generators(pipeline: VideoPipeline, given: dict[str, Any]) -> None:
    given |= {"latents": None, "num_videos_per_prompt": 2}
    both = pipeline(**given, **OFF, generator=(seeded(1), seeded(2))).frames
    assert torch.equal(both, pipeline(**given, **OFF, generator=[seeded(1), seeded(2)]).frames)


@ONE
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"stg_blocks": [1], "stg_applied_layers_idx": [1]},
            "stg_applied_layers_idx: expected stg_blocks under",
        ),
        ({"stg_blocks": [99]}, "stg_blocks: expected block numbers from 0 to 2, got"),
        ({"max_sequence_length": 256}, "max_sequence_length: expected 9, .*got 256: leave it out, or build"),
        ({"return_dict": False}, "return_dict: expected True, got False: read .frames"),
        (
            {"last_image": "a.png"},
            "last_image: expected none, for which this ltx-video checkpoint was not trained",
        ),
        (
            {"true_cfg_scale": 3.0},
            "true_cfg_scale: expected it for models that take .*, got 3.0",
        ),
        (
            {"decode_timestep": [0.05, 0.1]},
            "decode_timestep: expected one number or 1, got 2: give",
        ),
        ({"stg_scal": 1.0}, "arguments: expected those of VideoPipeline, got stg_scal: check the spelling"),
        ({"motion_speed": 0.5}, "arguments: expected those of VideoPipeline, got motion_speed"),
        ({"noise_scale": 0.5}, "arguments: expected those of VideoPipeline, got noise_scale"),
        ({"audio_latents": torch.zeros(1)}, "arguments: expected those of VideoPipeline, got audio_latents"),
    ],
)
def test_what_is_refused(
    pipeline: VideoPipeline, given: dict[str, Any], wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        pipeline(**given | wrong)
