"""The peers' model: its batch of rows equals passes of their own with the perturbation written plainly."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from stg_trt.benchmarks.diffusers_models import _MODELS
from stg_trt.benchmarks.eager_step import EagerStep, lower_precision, perturbed_skip_row
from stg_trt.benchmarks.scenario import Scenario
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.segment import Segment
from stg_trt.models.text import TextCondition
from tests.support.eager_reference import perturbed
from tests.support.family_cases import CASES, TIMESTEP, FamilyCase
from tests.support.family_cases.case import GOLDENS
from tests.support.scenarios import scenario_of

COMPARED = [case for case in CASES if case.family.name in _MODELS]


@pytest.mark.parametrize("mode", ["stg-a", "stg-r"])
@pytest.mark.parametrize("blocks", [(1,), (0, 1)])
@pytest.mark.parametrize("case", COMPARED, ids=str)
@torch.no_grad()
def test_rows_equal_passes_of_their_own(case: FamilyCase, mode: str, blocks: tuple[int, ...]) -> None:
    scenario = scenario_of(case, mode, blocks)
    model, inputs = scenario.opened.load_transformer(), scenario.inputs(4)
    same_timestep = replace(inputs.solver, timesteps=(TIMESTEP,) * 4)
    inputs = replace(inputs, solver=same_timestep)
    texts = {"uncond": inputs.uncond, "cond": inputs.cond, "skip": inputs.cond}
    latents = inputs.noise * inputs.solver.input_scale[1]
    names = [one.name for one in scenario.passes]
    expected = {name: case.predict(model, latents, texts[name]) for name in names[:-1]}
    with perturbed(model, mode, blocks, case.video):
        expected["skip"] = case.predict(model, latents, texts["skip"])
    eager = EagerStep(scenario, model, inputs, torch.float32, "cpu")
    with perturbed_skip_row(scenario, model):
        preds = eager.preds(inputs.noise, 1)
    torch.testing.assert_close(preds, torch.cat([*expected.values()]), rtol=0, atol=1e-5)
    assert (preds[-1] - preds[-2]).abs().max() > 1e-3
    restored = eager.preds(inputs.noise, 1)
    torch.testing.assert_close(restored[-1], restored[-2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", ["ltx2", "ltx2_3"])
@torch.no_grad()
def test_rows_of_a_video_with_sound(version: str) -> None:
    """As diffusers perturbs both streams itself, once its configuration says that it may."""
    scenario = Scenario(str(GOLDENS / version), 128, 160, 17, 8, "stg-a", (3,), "onnxruntime")
    model, inputs = scenario.opened.load_transformer(), scenario.inputs(4)
    eager = EagerStep(scenario, model, inputs, torch.float32, "cpu")
    with perturbed_skip_row(scenario, model):
        preds = eager.preds(inputs.noise, 1)
    config = {**scenario.opened.transformer_config, "perturbed_attn": True}
    native = type(model).from_config(config)
    native.load_state_dict(model.state_dict())
    mask = torch.tensor([1.0, 1.0, 0.0])
    perturbed_model = partial(native, spatio_temporal_guidance_blocks=[3], perturbation_mask=mask)
    expected = EagerStep(scenario, perturbed_model, inputs, torch.float32, "cpu").preds(inputs.noise, 1)
    torch.testing.assert_close(preds, expected, rtol=0, atol=1e-5)
    assert (preds[-1] - preds[-2]).abs().max() > 1e-3


@pytest.mark.parametrize(("mode", "blocks"), [("stg-a", (2, 3)), ("stg-r", (4,))])
@torch.no_grad()
def test_rows_of_a_model_that_diffusers_does_not_have(mode: str, blocks: tuple[int, ...]) -> None:
    """Open-Sora's equal the uncut segment with the perturbation in it."""
    scenario = Scenario(str(GOLDENS / "open_sora"), 32, 48, 17, 12, mode, blocks, "onnxruntime")
    family, workload, inputs = scenario.family, scenario.workload, scenario.inputs(4)
    model = scenario.opened.load_transformer()

    def expected(text: TextCondition, perturbation: Perturbation | None = None) -> Tensor:
        whole = Segment("normal", 0, family.num_blocks, front=True, back=True, skipped=perturbation)
        state = family.constants(text, workload, inputs.frame_rate)
        state |= {"text": model.y_embedder.y_proj(text.embeds), "latents": inputs.noise}
        state |= {"timestep": torch.tensor(inputs.solver.timesteps[1:2])}
        return family.module(model, whole, expand_masks=False).run(state)["pred"]

    with perturbed_skip_row(scenario, model):
        preds = EagerStep(scenario, model, inputs, torch.float32, "cpu").preds(inputs.noise, 1)
    wanted = [
        expected(inputs.uncond),
        expected(inputs.cond),
        expected(inputs.cond, Perturbation(mode, blocks)),
    ]
    torch.testing.assert_close(preds, torch.cat(wanted), rtol=0, atol=1e-5)
    assert (preds[-1] - preds[-2]).abs().max() > 1e-3


class TwoStreams(torch.nn.Module):
    """A block that changes a stream of video and one of text."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states + 1, encoder_hidden_states + 2


@pytest.mark.parametrize("named", [False, True])
def test_a_block_with_two_streams_keeps_both_rows(scenario: Scenario, named: bool) -> None:
    model = torch.nn.Module()
    model.transformer_blocks = torch.nn.ModuleList([TwoStreams(), TwoStreams()])
    for block in model.transformer_blocks:
        block.attn1 = scenario.opened.load_transformer().transformer_blocks[0].attn1
    video, text = torch.zeros(3, 4, 5), torch.zeros(3, 2, 5)
    with perturbed_skip_row(replace(scenario, stg_mode="stg-r"), model):
        first, second = model.transformer_blocks
        after = second(hidden_states=video, encoder_hidden_states=text) if named else second(video, text)
        assert [stream[:, 0, 0].tolist() for stream in after] == [[1, 1, 0], [2, 2, 0]]
        assert [stream[:, 0, 0].tolist() for stream in first(video, text)] == [[1, 1, 1], [2, 2, 2]]


def test_lower_precision_is_that_of_diffusers(wan_scenario: Scenario) -> None:
    model = lower_precision(wan_scenario.opened.load_transformer(), torch.bfloat16)
    expected = type(model).from_pretrained(
        wan_scenario.source, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    found = {name: tensor.dtype for name, tensor in model.named_parameters()}
    assert found == {name: tensor.dtype for name, tensor in expected.named_parameters()}
    assert set(found.values()) == {torch.float32, torch.bfloat16}
