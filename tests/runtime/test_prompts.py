"""Prompts and embeddings of a call: those that are accepted, and those that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.families.base import POOLED
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.models.text import TextCondition
from stg_trt.runtime.prompts import Embeddings, Prompts

LENGTH, WIDTH, POOLED_WIDTH = 6, 4, 3
SPECS = {"prompt_embeds": TensorSpec("prompt_embeds", "float32", (ROWS, LENGTH, WIDTH))}
WITH_POOLED = {**SPECS, POOLED: TensorSpec(POOLED, "float32", (ROWS, POOLED_WIDTH))}
NOTHING = Embeddings(None, None, None)


def given(**changes: Any) -> Embeddings:
    """Two videos' embeddings of five tokens."""
    tensors: dict[str, Tensor | None] = {
        "embeds": torch.arange(40.0).reshape(2, 5, WIDTH),
        "mask": torch.ones(2, 5),
        "pooled": torch.arange(6.0).reshape(2, POOLED_WIDTH),
    }
    return Embeddings(**{**tensors, **changes})


def conditions(
    positive: Embeddings, negative: Embeddings, *, specs: dict[str, TensorSpec] = WITH_POOLED, times: int = 1
) -> tuple[TextCondition, TextCondition | None]:
    prompts = Prompts(None, None, positive, negative, times)
    sides = (prompts.cond, prompts.uncond if negative is not NOTHING else None)
    assert all(side is None or side.texts is None for side in sides)
    cond, uncond = (None if side is None else side.padded(specs, True).repeated(times) for side in sides)
    assert cond is not None
    return cond, uncond


def test_embeddings_are_padded_and_repeated() -> None:
    cond, uncond = conditions(given(), NOTHING, times=2)
    assert uncond is None and cond.pooled is not None
    assert cond.embeds.shape == (4, LENGTH, WIDTH) and not cond.embeds[:, 5].any()
    assert cond.mask.tolist() == [[1, 1, 1, 1, 1, 0]] * 4
    assert torch.equal(cond.pooled, torch.tensor([[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5.0]]))
    assert torch.equal(cond.embeds[1], cond.embeds[0]) and not torch.equal(cond.embeds[1], cond.embeds[2])


def test_negative_embeddings_are_the_uncond_rows() -> None:
    cond, uncond = conditions(given(), given(pooled=torch.full((2, POOLED_WIDTH), 7.0)))
    assert uncond is not None and uncond.pooled is not None and cond.pooled is not None
    assert uncond.pooled.unique().tolist() == [7.0] and cond.pooled.unique().tolist() == [0, 1, 2, 3, 4, 5]


def test_conditions_are_stacked_and_guided() -> None:
    cond, _ = conditions(given(), NOTHING)
    stacked = TextCondition.stacked((cond, cond)).guided(2.5)
    assert stacked.pooled is not None and stacked.pooled.shape == (4, POOLED_WIDTH)
    assert stacked.guidance is not None and stacked.guidance.tolist() == [2.5] * 4
    assert cond.guided(None).guidance is None


def test_a_tokenizer_may_pad_on_the_left() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for dtype in (torch.int64, torch.bool, torch.float32):
        prompt = Prompts(None, None, given(mask=mask.to(dtype), pooled=None), NOTHING, 1).cond
        text = prompt.padded(SPECS, True, pads_left=True)
        assert text.mask.tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
        assert not text.embeds[:, 0].any()
        assert torch.equal(text.embeds[:, 1:], torch.arange(40.0).reshape(2, 5, WIDTH))


@pytest.mark.parametrize("prefix", ["", "negative_"])
def test_padding_on_the_other_side_is_refused(prefix: str) -> None:
    """Which LTX-2's connectors would read as if it were the text."""
    wrong = given(mask=torch.tensor([[True] * 3 + [False] * 2] * 2), pooled=None)
    prompts = Prompts(None, None, given(pooled=None), wrong, 1)
    prompt = prompts.uncond if prefix else Prompts(None, None, wrong, NOTHING, 1).cond
    with pytest.raises(
        InvalidRequest, match=f"^{prefix}prompt_attention_mask: expected padding before .*: pad on the left"
    ):
        prompt.padded(SPECS, True, pads_left=True)


def test_conditions_of_the_sound_go_along() -> None:
    text = TextCondition(torch.ones(2, 3, 4), torch.ones(2, 3), audio=torch.arange(12.0).reshape(2, 3, 2))
    doubled = TextCondition.stacked((text.repeated(2), text)).to("cpu", torch.bfloat16)
    assert text.audio is not None and doubled.audio is not None
    assert torch.equal(doubled.audio.float(), text.audio[[0, 0, 1, 1, 0, 1]])
    assert doubled.embeds.dtype == torch.bfloat16 and doubled.mask.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "specs", "message"),
    [
        (
            {"mask": None},
            WITH_POOLED,
            "prompt_attention_mask: expected a tensor beside prompt_embeds, got None",
        ),
        ({"mask": torch.ones(2, 4)}, WITH_POOLED, r"prompt_attention_mask: expected \(2, 5\), got \(2, 4\)"),
        (
            {"pooled": None},
            WITH_POOLED,
            "pooled_prompt_embeds: expected a tensor beside prompt_embeds, got None",
        ),
        ({"pooled": torch.ones(2, 4)}, WITH_POOLED, r"pooled_prompt_embeds: expected \(2, 3\), got \(2, 4\)"),
        ({"pooled": torch.ones(1, 3)}, WITH_POOLED, r"pooled_prompt_embeds: expected \(2, 3\), got \(1, 3\)"),
        ({}, SPECS, "pooled_prompt_embeds: expected none for this model, got a tensor: leave it out"),
    ],
)
def test_embeddings_that_do_not_fit(
    changes: dict[str, Any], specs: dict[str, TensorSpec], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        conditions(given(**changes), NOTHING, specs=specs)
    with pytest.raises(InvalidRequest, match=f"^negative_{message}"):
        conditions(given() if specs is WITH_POOLED else given(pooled=None), given(**changes), specs=specs)


def test_pooled_embeddings_beside_a_text() -> None:
    with pytest.raises(
        InvalidRequest, match="pooled_prompt_embeds: expected it beside prompt_embeds, got it"
    ):
        Prompts("a red circle", None, given(embeds=None, mask=None), NOTHING, 1)


@pytest.mark.parametrize(
    ("prompt", "negative", "texts", "against"),
    [
        ("a red circle", None, ["a red circle"], [""]),
        (["a", "b"], "c", ["a", "b"], ["c", "c"]),
        (["a", "b"], ["c", "d"], ["a", "b"], ["c", "d"]),
    ],
)
def test_texts_to_encode(
    prompt: str | list[str], negative: str | list[str] | None, texts: list[str], against: list[str]
) -> None:
    prompts = Prompts(prompt, negative, NOTHING, NOTHING, 3)
    assert prompts.cond.texts == texts and prompts.uncond.texts == against
    assert prompts.videos == 3 * len(texts)


def test_negative_embeddings_beside_a_text_are_taken() -> None:
    prompts = Prompts(["a", "b"], None, NOTHING, given(), 1)
    assert prompts.cond.texts == ["a", "b"] and prompts.uncond.texts is None
    assert torch.equal(
        prompts.uncond.padded(WITH_POOLED, True).embeds[:, :5], torch.arange(40.0).reshape(2, 5, 4)
    )
    three = Prompts(["a", "b", "c"], None, NOTHING, given(), 1)
    with pytest.raises(
        InvalidRequest, match=r"negative_prompt_embeds: expected \(3, <= 6, 4\), got \(2, 5, 4\)"
    ):
        three.uncond.padded(WITH_POOLED, True)


def test_negative_texts_are_one_per_prompt() -> None:
    with pytest.raises(InvalidRequest, match="negative_prompt: expected one text or 2, got 3: give one per"):
        _ = Prompts(["a", "b"], ["c", "d", "e"], NOTHING, NOTHING, 1).uncond
