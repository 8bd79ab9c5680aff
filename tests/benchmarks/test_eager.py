"""The peers' model: its batch of rows equals passes of their own with the perturbation written plainly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stg_trt.benchmarks.eager import EagerStep, lower_precision, perturbed_skip_row
from stg_trt.benchmarks.setting import Setting
from stg_trt.families.base import TextCondition
from tests.eager_reference import perturbed

Row = Callable[[Any, Tensor, TextCondition, Tensor], Tensor]


def ltx_row(model: Any, latents: Tensor, text: TextCondition, timestep: Tensor) -> Tensor:
    pred: Tensor = model(
        latents,
        text.embeds,
        timestep,
        text.mask,
        num_frames=2,
        height=2,
        width=2,
        rope_interpolation_scale=(8 / 25, 32, 32),
        return_dict=False,
    )[0]
    return pred


def wan_row(model: Any, latents: Tensor, text: TextCondition, timestep: Tensor) -> Tensor:
    embeds = text.embeds * text.mask[:, :, None]
    pred: Tensor = model(latents, timestep, embeds, return_dict=False)[0]
    return pred


@pytest.fixture(params=[("setting", ltx_row), ("wan_setting", wan_row)], ids=["ltx", "wan"])
def case(request: pytest.FixtureRequest) -> tuple[Setting, Row]:
    name, row = request.param
    return request.getfixturevalue(name), row


@pytest.mark.parametrize("mode", ["stg-a", "stg-r"])
@pytest.mark.parametrize("blocks", [(1,), (0, 1)])
@torch.no_grad()
def test_rows_equal_passes_of_their_own(
    case: tuple[Setting, Row], mode: str, blocks: tuple[int, ...]
) -> None:
    given, row = case
    setting = replace(given, stg_mode=mode, stg_blocks=blocks)
    model, inputs = setting.opened.load_transformer(), setting.inputs(4)
    timestep = torch.tensor([inputs.solver.timesteps[1]])
    latents = inputs.noise * inputs.solver.input_scale[1]
    expected = [row(model, latents, text, timestep) for text in (inputs.uncond, inputs.cond)]
    with perturbed(model, mode, blocks):
        expected.append(row(model, latents, inputs.cond, timestep))
    eager = EagerStep(setting, model, inputs, torch.float32, "cpu")
    with perturbed_skip_row(setting, model):
        preds = eager.preds(inputs.noise, 1)
    torch.testing.assert_close(preds, torch.cat(expected), rtol=0, atol=1e-5)
    assert (preds[2] - preds[1]).abs().max() > 1e-3
    restored = eager.preds(inputs.noise, 1)
    torch.testing.assert_close(restored[2], restored[1], rtol=0, atol=1e-5)


class TwoStreams(torch.nn.Module):
    """A block that changes a stream of video and one of text."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states + 1, encoder_hidden_states + 2


@pytest.mark.parametrize("named", [False, True])
def test_a_block_with_two_streams_keeps_both_rows(setting: Setting, named: bool) -> None:
    model = torch.nn.Module()
    model.transformer_blocks = torch.nn.ModuleList([TwoStreams(), TwoStreams()])
    for block in model.transformer_blocks:
        block.attn1 = setting.opened.load_transformer().transformer_blocks[0].attn1
    video, text = torch.zeros(3, 4, 5), torch.zeros(3, 2, 5)
    with perturbed_skip_row(replace(setting, stg_mode="stg-r"), model):
        first, second = model.transformer_blocks
        after = second(hidden_states=video, encoder_hidden_states=text) if named else second(video, text)
        assert [stream[:, 0, 0].tolist() for stream in after] == [[1, 1, 0], [2, 2, 0]]
        assert [stream[:, 0, 0].tolist() for stream in first(video, text)] == [[1, 1, 1], [2, 2, 2]]


def test_lower_precision_is_that_of_diffusers(wan_setting: Setting) -> None:
    model = lower_precision(wan_setting.opened.load_transformer(), torch.bfloat16)
    expected = type(model).from_pretrained(
        wan_setting.source, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    found = {name: tensor.dtype for name, tensor in model.named_parameters()}
    assert found == {name: tensor.dtype for name, tensor in expected.named_parameters()}
    assert set(found.values()) == {torch.float32, torch.bfloat16}
