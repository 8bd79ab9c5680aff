"""The joint attention and its perturbation, against one masked attention over all tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stg_trt.models.families import joint_attention
from stg_trt.models.families.joint_attention import QKV, JointAttentionSegment
from stg_trt.models.segment import Segment

ROWS, HEADS, TOKENS, TEXT, SIZE = 3, 2, 11, 5, 8


class Attention(JointAttentionSegment):
    """No blocks: only the attention is called."""

    def __init__(self, expand_masks: bool) -> None:
        super().__init__(Segment("mid"), (), (1, 1, 1), (), (), expand_masks)


@pytest.fixture
def streams() -> tuple[QKV, QKV]:
    generator = torch.Generator().manual_seed(0)

    def stream(tokens: int) -> QKV:
        return QKV(*torch.randn(3, ROWS, HEADS, tokens, SIZE, generator=generator))

    return stream(TOKENS), stream(TEXT)


def padding() -> Tensor:
    """Each row has another number of real text tokens; the last has none."""
    real = torch.arange(TEXT) < torch.tensor([5, 2, 0])[:, None]
    every = torch.cat([torch.ones(ROWS, TOKENS, dtype=torch.bool), real], 1)
    return torch.where(every, 0.0, -10000.0)[:, None, None]


def masked(video: QKV, text: QKV, bias: Tensor, perturbed: bool) -> Tensor:
    """One softmax over all tokens; (rows, tokens and text, channels)."""
    query, key, value = (torch.cat(pair, 2).double() for pair in zip(video, text, strict=True))
    seen = torch.ones(TOKENS + TEXT, TOKENS + TEXT, dtype=torch.bool)
    if perturbed:
        seen[:TOKENS, :TOKENS] = torch.eye(TOKENS, dtype=torch.bool)
    logits = query @ key.transpose(-1, -2) / SIZE**0.5 + bias + torch.where(seen, 0.0, -torch.inf)
    attended: Tensor = logits.softmax(-1) @ value
    return attended.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("chunk", [2048, 4])
@pytest.mark.parametrize("expand_masks", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("perturbed", [False, True])
def test_every_row_as_one_masked_attention(
    streams: tuple[QKV, QKV],
    perturbed: bool,
    with_bias: bool,
    expand_masks: bool,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(joint_attention, "_CHUNK", chunk)
    bias = padding() if with_bias else torch.zeros(ROWS, 1, 1, TOKENS + TEXT)
    state = {"key_bias": bias} if with_bias else {}
    module, expected = Attention(expand_masks), masked(*streams, bias, perturbed)
    out = torch.cat(module.joint_attention(*streams, state, perturbed), 1)
    assert (out - expected).abs().max() <= 2e-6
    video_alone = module.video_attention(*streams, state, perturbed)
    assert (video_alone - expected[:, :TOKENS]).abs().max() <= 2e-6


def test_keep_attention_chooses_by_row(streams: tuple[QKV, QKV]) -> None:
    keep = torch.tensor([True, False, True])
    state = {"key_bias": padding(), "keep_attention": keep}
    out = torch.cat(Attention(False).joint_attention(*streams, state, False), 1)
    kept, perturbed = (masked(*streams, padding(), skip) for skip in (False, True))
    expected = torch.where(keep[:, None, None], kept, perturbed)
    assert (out - expected).abs().max() <= 2e-6
    # Fewer queries at once may be summed in another order.
    of_video = Attention(False).video_attention(*streams, state, False)
    assert (of_video - out[:, :TOKENS]).abs().max() <= 2e-6
    assert (kept - perturbed)[1, :TOKENS].abs().max() > 0.1


def test_half_precision_is_summed_in_float32(streams: tuple[QKV, QKV]) -> None:
    video, text = (QKV(*(x.bfloat16() for x in stream)) for stream in streams)
    out = Attention(False).joint_attention(video, text, {}, True)[0]
    exact = masked(video, text, torch.zeros(1), True)[:, :TOKENS]
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
