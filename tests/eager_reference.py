"""STG written plainly on an uncut diffusers model: what cut and compiled models are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class ValuesOnly:
    """stg-a as a diffusers attention processor: to_out(V)."""

    def __call__(self, attn: Any, hidden_states: Tensor, *unused: Any, **unused_too: Any) -> Tensor:
        attended: Tensor = attn.to_out[0](attn.to_v(hidden_states))
        return attended


@contextmanager
def perturbed(model: Any, mode: str, blocks: Sequence[int]) -> Iterator[None]:
    """The uncut model with perturbed blocks, restored afterwards."""
    every = model.transformer_blocks if hasattr(model, "transformer_blocks") else model.blocks
    chosen = [every[block] for block in blocks]
    processors = [block.attn1.processor for block in chosen]
    try:
        for block in chosen:
            if mode == "stg-r":
                block.forward = lambda hidden_states, *unused, **unused_too: hidden_states
            else:
                block.attn1.set_processor(ValuesOnly())
        yield
    finally:
        for block, processor in zip(chosen, processors, strict=True):
            vars(block).pop("forward", None)
            block.attn1.set_processor(processor)
