"""Prompt to video with compiled engines against diffusers' own pipelines, on whole tiny checkpoints."""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stg_trt import VideoPipeline
from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.runtime.components import Components
from tests.support.family_cases import CASES, FamilyCase
from tests.support.whole_pipelines import PROMPTS, STEPS, TEXT_LENGTH, call, cfg_of, of_diffusers, seeded


@pytest.mark.parametrize("output_type", ["latent", "np"])
def test_cfg_is_that_of_diffusers(
    case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline, output_type: str
) -> None:
    shared = call(case, pipeline, PROMPTS)
    for scheduler in case.schedulers:
        pipeline.scheduler = scheduler
        # A solver may add noise.
        noise = [[seeded(1), seeded(2)] for _ in range(2)]
        expected = of_diffusers(case, checkpoint, scheduler, output_type, **shared, generator=noise[0])
        given = shared | {"stg_scale": 0.0, "rescale": 0.0, "generator": noise[1]}
        got = pipeline(**given, output_type=output_type).frames
        assert got.shape == expected.shape and np.std(np.asarray(expected)) > 0.01
        assert np.abs(np.asarray(got) - np.asarray(expected)).max() <= 1e-4


def test_dynamic_cfg_is_that_of_diffusers(
    case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline
) -> None:
    if "use_dynamic_cfg" not in inspect.signature(case.pipeline_class.__call__).parameters:
        pytest.skip("its pipeline has no dynamic CFG")
    scheduler = pipeline.scheduler = case.schedulers[0]
    given = call(case, pipeline, PROMPTS[:1])
    plain, expected = (
        of_diffusers(case, checkpoint, scheduler, "latent", **given, generator=seeded(5), use_dynamic_cfg=on)
        for on in (False, True)
    )
    given |= {"generator": seeded(5), "stg_scale": 0.0, "use_dynamic_cfg": True}
    got = pipeline(**given, output_type="latent").frames
    assert (got - expected).abs().max() <= 1e-4 and (plain - expected).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [1.0, [3.0] * STEPS])
def test_dynamic_cfg_wants_one_scale_to_change(pipeline: VideoPipeline, case: FamilyCase, scale: Any) -> None:
    given = call(case, pipeline, PROMPTS[:1]) | cfg_of(case, scale)
    with pytest.raises(
        InvalidRequest, match="use_dynamic_cfg: expected guidance_scale as one number above 1"
    ):
        pipeline(**given, use_dynamic_cfg=True)


def test_padded_embeddings_are_refused_where_padding_takes_part(
    case: FamilyCase, pipeline: VideoPipeline
) -> None:
    if case.padding != "kept":
        pytest.skip("padding is masked or zeros")
    width = pipeline.family.tensors(case.workload)["prompt_embeds"].shape[-1]
    assert isinstance(width, int)
    embeds = {name: torch.randn(1, 5, width) for name in ("prompt_embeds", "negative_prompt_embeds")}
    given = call(case, pipeline, PROMPTS[:1]) | {"prompt": None, "negative_prompt": None} | embeds
    with pytest.raises(InvalidRequest, match=f"prompt_embeds: expected {TEXT_LENGTH} tokens .*got 5: pad"):
        pipeline(**given)


def test_the_negative_prompt_that_is_not_given(
    case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline
) -> None:
    scheduler = pipeline.scheduler = case.schedulers[0]
    given = call(case, pipeline, PROMPTS) | {"negative_prompt": None}
    if case.family.takes_true_cfg:
        # There is no CFG in diffusers then; here it would be on.
        with pytest.raises(InvalidRequest, match="true_cfg_scale: expected a negative prompt beside it"):
            pipeline(**given)
        return
    expected = of_diffusers(case, checkpoint, scheduler, "latent", **given, generator=seeded(5))
    given |= {"generator": seeded(5), "stg_scale": 0.0, "rescale": 0.0}
    got = pipeline(**given, output_type="latent").frames
    assert (got - expected).abs().max() <= 1e-4


def test_noise_is_drawn_as_diffusers_draws_it(
    case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline
) -> None:
    scheduler = pipeline.scheduler = case.schedulers[0]
    given = call(case, pipeline, PROMPTS[:1]) | {"latents": None}
    expected = of_diffusers(case, checkpoint, scheduler, "latent", **given, generator=seeded(5))
    given |= {"generator": seeded(5), "stg_scale": 0.0, "rescale": 0.0}
    assert (pipeline(**given, output_type="latent").frames - expected).abs().max() <= 1e-4


def test_stg_changes_the_frames(case: FamilyCase, pipeline: VideoPipeline) -> None:
    given = call(case, pipeline, PROMPTS[:1])
    with_stg, without = (
        pipeline(**given, stg_scale=scale, output_type="np", generator=seeded(1)).frames
        for scale in (1.0, 0.0)
    )
    assert with_stg.shape == (1, case.workload.num_frames, case.workload.height, case.workload.width, 3)
    assert np.abs(with_stg - without).max() > 1e-3


def test_the_guidance_that_a_model_takes_as_an_input(case: FamilyCase, pipeline: VideoPipeline) -> None:
    """It is guidance_scale there, as in diffusers; elsewhere that is CFG and has no other name."""
    default = pipeline.family.embedded_guidance
    given = (
        call(case, pipeline, PROMPTS[:1]) | cfg_of(case, 1.0) | {"stg_scale": 0.0, "num_inference_steps": 2}
    )
    if default is None:
        with pytest.raises(InvalidRequest, match=r"true_cfg_scale: expected it for .*, got 6.0: use guid"):
            pipeline(**given, true_cfg_scale=6.0)
        return
    with pytest.raises(InvalidRequest, match=r"guidance_scale: expected one number, .*got \[6.0\]: give one"):
        pipeline(**given | {"guidance_scale": [6.0]})
    same, by_default, other = (
        pipeline(**given | {"guidance_scale": scale}, output_type="latent").frames
        for scale in (default, None, 1.0)
    )
    assert torch.equal(same, by_default) and (same - other).abs().max() > 1e-4


def test_guidance_on_top_of_the_embedded_is_warned_of_once(case: FamilyCase, pipeline: VideoPipeline) -> None:
    fresh = VideoPipeline(pipeline.checkpoint, pipeline.store)
    given = call(case, fresh, PROMPTS[:1]) | {"num_inference_steps": 2, "output_type": "latent"}
    told = []
    for scale in (1.0, 4.0, 4.0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fresh(**given | cfg_of(case, scale))
        told.append([str(warning.message) for warning in caught if warning.category is UserWarning])
        assert all(Path(warning.filename) == Path(__file__) for warning in caught if told[-1])
    distilled = case.family.embedded_guidance is not None
    assert [len(messages) for messages in told] == [0, int(distilled), 0]
    assert not distilled or "got 4.0: CFG on top of it doubles the work" in told[1][0]


def test_text_tokens_are_those_that_the_pipeline_takes(
    case: FamilyCase, pipeline: VideoPipeline, checkpoint: Path
) -> None:
    components = pipeline.components
    workload = replace(case.workload, text_length=TEXT_LENGTH)
    condition = components.encode(PROMPTS, workload, torch.device("cpu"))
    counted = [pipeline.family.text_tokens(components._pipeline, prompt) for prompt in PROMPTS]
    # Padding that is kept is text as any other.
    real = [TEXT_LENGTH] * len(PROMPTS) if case.padding == "kept" else counted
    assert condition.mask.sum(1).tolist() == real and max(counted) < TEXT_LENGTH
    assert condition.mask[:, 0].all() and condition.embeds.shape[:2] == (2, TEXT_LENGTH)


def test_every_text_encoder_comes_and_goes(
    case: FamilyCase, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components, device = (
        Components(Checkpoint.open(checkpoint), dtype=None, offload=True),
        torch.device("cpu"),
    )
    components.load(device)
    moved: list[str] = []
    for name, part in components._pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            monkeypatch.setattr(part, "to", lambda place, name=name: moved.append(name))
    components.encode(PROMPTS, replace(case.workload, text_length=TEXT_LENGTH), device)
    encoders = [name for name in components._pipeline.components if name.startswith("text_encoder")]
    assert moved == encoders * 2 and encoders


def test_a_prompt_that_is_too_long_is_refused(case: FamilyCase, pipeline: VideoPipeline) -> None:
    given = call(case, pipeline, ["red " * TEXT_LENGTH])
    too_long = f"prompt: expected at most {TEXT_LENGTH} tokens, got {TEXT_LENGTH + 1}"
    with pytest.raises(InvalidRequest, match=too_long):
        pipeline(**given)


def test_parts_have_their_dtypes_on_a_gpu(case: FamilyCase, checkpoint: Path) -> None:
    """Loading moves nothing, so that this needs no GPU."""
    components = Components(Checkpoint.open(checkpoint), dtype=None, offload=False)
    components.load(torch.device("cuda"))
    wide = "vae" in case.family.float32_components
    assert components._pipeline.vae.dtype == (torch.float32 if wide else torch.bfloat16)
    assert components._pipeline.text_encoder.dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_folder_without_a_part_is_refused(
    case: FamilyCase, checkpoint: Path, part: str, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / part)
    components = Components(Checkpoint.open(tmp_path / "model"), dtype=None, offload=False)
    with pytest.raises(InvalidRequest) as refused:
        components.load(torch.device("cpu"))
    message = str(refused.value)
    assert f"checkpoint: expected a whole {case.family.pipeline_class} folder, got " in message
    assert message.endswith(": download it again") and "\n" not in message


@pytest.mark.parametrize("random_weights", [False, True])
@pytest.mark.parametrize(
    ("one", "index", "message"),
    [(one, *refused) for one in CASES for refused in one.refused_indexes],
    ids=str,
)
def test_a_folder_of_another_pipeline_is_refused(
    tmp_path: Path, one: FamilyCase, index: dict[str, Any], message: str, random_weights: bool
) -> None:
    shutil.copytree(one.goldens, tmp_path / "model")
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidRequest) as refused:
        Checkpoint.open(tmp_path / "model", random_weights=random_weights).check()
    assert message in str(refused.value)
