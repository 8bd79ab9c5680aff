"""Joint-attention blocks of two kinds: with weights for each stream (double), and one set for both (single).

The embedded timestep `temb` is (rows, channels), or (rows, timesteps, channels) if the tokens of a row have
several: then an index says which of them is whose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stg_trt.models.families.dit import State, gated
from stg_trt.models.families.joint_attention import (
    QKV,
    JointAttentionSegment,
    feed_forward,
    modulated,
    modulation,
    normed_qkv,
    rotated,
)
from stg_trt.models.families.token_timesteps import TIMESTEP_INDEX, of_tokens

VIDEO = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
"""Names of a stream's projections and norms."""


def of_step(temb: Tensor) -> Tensor:
    """What is embedded of the step's own timestep, (rows, channels)."""
    return temb if temb.ndim == 2 else temb[:, 0]


class DoubleSingleSegment(JointAttentionSegment):
    """Blocks alone; a subclass adds embedding and head."""

    def block(self, block: Any, state: State, perturbed: bool) -> State:
        single = hasattr(block, "proj_mlp")
        return (self.single_block if single else self.double_block)(block, state, perturbed)

    def modulations(self, linear: Any, state: State, parts: int, text_tokens: int = 0) -> Sequence[Tensor]:
        """Of the video's tokens and text tokens after them, (rows, 1 or tokens, channels) each."""
        if state["temb"].ndim == 2:
            return modulation(linear, state["temb"]).chunk(parts, -1)
        places = state[TIMESTEP_INDEX]
        both = torch.cat([places, places.new_zeros(text_tokens)]) if text_tokens else places
        tables = modulation(linear, state["temb"]).squeeze(1).chunk(parts, -1)
        return of_tokens(tables, {TIMESTEP_INDEX: both})

    def double_block(self, block: Any, state: State, perturbed: bool) -> State:
        """A block with weights for each stream."""
        video, text = state["hidden_states"], state["encoder_hidden_states"]
        shift, scale, gate, *video_ff = self.modulations(block.norm1.linear, state, 6)
        text_shift, text_scale, text_gate, *text_ff = modulation(
            block.norm1_context.linear, of_step(state["temb"])
        ).chunk(6, -1)
        normed = modulated(block.norm1.norm, video, shift, scale)
        normed_text = modulated(block.norm1_context.norm, text, text_shift, text_scale)
        attended, attended_text = self.joint_attention(
            rotated(normed_qkv(block.attn, normed, VIDEO), state, video.dtype),
            QKV(*(x.to(text.dtype) for x in normed_qkv(block.attn, normed_text, TEXT))),
            state,
            perturbed,
        )
        video = gated(video, block.attn.to_out[0](attended), gate)
        text = gated(text, block.attn.to_add_out(attended_text), text_gate)
        return {
            "hidden_states": feed_forward(block.norm2, block.ff, video, *video_ff),
            "encoder_hidden_states": feed_forward(block.norm2_context, block.ff_context, text, *text_ff),
        }

    def single_block(self, block: Any, state: State, perturbed: bool) -> State:
        """A block with one set of weights, attention and feed-forward side by side."""
        tokens = state["hidden_states"].shape[1]
        both = torch.cat([state["hidden_states"], state["encoder_hidden_states"]], 1)
        shift, scale, gate = self.modulations(block.norm.linear, state, 3, text_tokens=both.shape[1] - tokens)
        normed = modulated(block.norm.norm, both, shift, scale)
        qkv = normed_qkv(block.attn, normed, VIDEO)
        attended = self.joint_attention(
            rotated(QKV(*(x[:, :, :tokens] for x in qkv)), state, both.dtype),
            QKV(*(x[:, :, tokens:].to(both.dtype) for x in qkv)),
            state,
            perturbed,
        )
        wide = torch.cat([torch.cat(attended, 1), block.act_mlp(block.proj_mlp(normed))], 2)
        both = gated(both, block.proj_out(wide), gate)
        return {"hidden_states": both[:, :tokens], "encoder_hidden_states": both[:, tokens:]}
