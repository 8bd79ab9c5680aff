"""STG written plainly on a diffusers model: the reference for cut and compiled models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks")


@contextmanager
def perturbed(model: Any, mode: str, blocks: Sequence[int], video: slice | None = None) -> Iterator[None]:
    """The diffusers model with perturbed blocks, restored afterwards.

    `video` says which tokens of a joint attention are the video's; None if they are all of them.
    """
    every = [block for name in BLOCK_LISTS for block in getattr(model, name, ())]
    chosen = [every[block] for block in blocks]
    try:
        for block in chosen:
            if mode == "stg-r":
                block.forward = unchanged if video is None else both_unchanged
            elif video is None:
                block.attn1.forward = values_only(block.attn1)
            else:
                block.forward = self_and_text_only(block.forward, video)
        yield
    finally:
        for block in chosen:
            for module in block.modules():
                vars(module).pop("forward", None)


def unchanged(hidden_states: Tensor, *unused: Any, **unused_too: Any) -> Tensor:
    """stg-r of a block with one stream."""
    return hidden_states


def both_unchanged(
    hidden_states: Tensor, encoder_hidden_states: Tensor, *unused: Any, **unused_too: Any
) -> tuple[Tensor, Tensor]:
    """stg-r of a block with a stream of video and one of text."""
    return hidden_states, encoder_hidden_states


def values_only(attn: Any) -> Callable[..., Tensor]:
    """stg-a of a self-attention: to_out(V)."""

    def forward(hidden_states: Tensor, *unused: Any, **unused_too: Any) -> Tensor:
        attended: Tensor = attn.to_out[0](attn.to_v(hidden_states))
        return attended

    return forward


def self_and_text_only(forward: Callable[..., Any], video: slice) -> Callable[..., Any]:
    """stg-a of a joint attention: a mask over all pairs, under which video tokens see no other of them."""
    plain = torch.nn.functional.scaled_dot_product_attention

    def masked(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **others: Any
    ) -> Tensor:
        tokens = query.shape[2]
        seen = torch.ones(tokens, tokens, dtype=torch.bool)
        seen[video, video] = torch.eye(len(seen[video]), dtype=torch.bool)
        if attn_mask is not None:
            assert attn_mask.dtype == torch.bool
            seen = seen & attn_mask
        return plain(query, key, value, attn_mask=seen, **others)

    def run(*arguments: Any, **named: Any) -> Any:
        with mock.patch("torch.nn.functional.scaled_dot_product_attention", masked):
            return forward(*arguments, **named)

    return run
