"""Diffusion transformers whose blocks are self-attention, cross-attention to the text, and feed-forward.

The text is projected once per call; RoPE tables are constant. Two kinds of tensors cross a cut: the hidden
states, and two that are made of the timestep: the modulation of the blocks and that of the head.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from stg_trt.models.families.dit import DiT, DiTSegment, State, rms_norm
from stg_trt.models.families.keep_flags import KEEP_ATTENTION
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.models.workload import Workload

_ROPE = ("rope_cos", "rope_sin")


class CrossAttentionDiT(DiT):
    """Borders and costs; a subclass adds its own tensors and writes its block out."""

    plugins = frozenset({"qk_norm_rope"})
    # Names of the two tensors that the front makes of the timestep: for every block, and for the head.
    modulation: ClassVar[str]
    head_modulation: ClassVar[str]
    # Inputs of the front beside latents and timestep, and of the head beside the hidden states.
    front_constants: tuple[str, ...] = ()
    head_constants: tuple[str, ...] = ()
    # Timesteps that the tokens of one row can have.
    timestep_places: int = 1

    @abstractmethod
    def text_module(self, transformer: Any, *borders: Any) -> SegmentModule:
        """The text segment."""

    def text_borders(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Inputs and outputs of the text segment."""
        return ("prompt_embeds",), ("text",)

    @property
    def context_tokens(self) -> int:
        """Tokens of the cross-attention beside the text's, to which it attends apart; 0 for none."""
        return 0

    def context_flops(self) -> int:
        """Operations of their projection for one row."""
        return 0

    def tensors(self, workload: Workload) -> dict[str, TensorSpec]:
        text = TensorSpec("text", workload.dtype, (ROWS, workload.text_length, self.width))
        return super().tensors(workload) | {text.name: text}

    def borders(self, segment: Segment) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if segment.text:
            return self.text_borders()
        read = (self.modulation, *self.block_constants) if segment.blocks else ()
        of_head = self.head_constants if segment.back else ()
        if segment.skipped is not None and segment.skipped.blocks == tuple(segment.blocks):
            unused = _ROPE if segment.skipped.mode == "stg-a" else read
            read = tuple(name for name in read if name not in unused)
        read += tuple(name for name in of_head if name not in read)
        if segment.front:
            # The front makes the modulation that its own blocks read.
            made_here = (name for name in read if name != self.modulation)
            inputs = ("latents", *self.front_constants, "timestep", *made_here)
        else:
            inputs = ("hidden_states", *read)
        if segment.keep_input:
            inputs += (KEEP_ATTENTION,)
        if segment.back:
            return inputs if segment.front else (*inputs, self.head_modulation), ("pred",)
        made = (self.modulation, self.head_modulation) if segment.front else ()
        return inputs, ("hidden_states", *made)

    def segment_flops(self, segment: Segment, workload: Workload) -> int:
        tokens, text, width = self.tokens(workload), workload.text_length, self.width
        if segment.text:
            return 2 * text * width * (self.text_channels + width) + self.context_flops()
        text += self.context_tokens
        cross = 2 * tokens * 2 * width**2 + 2 * text * 2 * width**2 + 4 * tokens * text * width
        feed_forward = 2 * tokens * 2 * width * self.feed_forward_width
        self_attention = 2 * tokens * 4 * width**2 + 4 * tokens**2 * width
        without_attention = 2 * tokens * 2 * width**2
        total = 0
        for block in segment.blocks:
            skipped = segment.skipped is not None and block in segment.skipped.blocks
            if skipped and segment.skipped is not None and segment.skipped.mode == "stg-r":
                continue
            total += cross + feed_forward + (without_attention if skipped else self_attention)
        latents = math.prod(self.patch)
        if segment.front:
            total += 2 * tokens * width * latents * self.integer("in_channels")
            total += self.timestep_places * 2 * width * (self.timestep_channels + 7 * width)
        if segment.back:
            total += 2 * tokens * width * latents * self.integer("out_channels")
        return total

    def attentions(self, segment: Segment) -> int:
        skipped = segment.skipped.blocks if segment.skipped else ()
        crossing = 2 if self.context_tokens else 1
        per_skipped = crossing if segment.skipped and segment.skipped.mode == "stg-a" else 0
        return sum(per_skipped if block in skipped else 1 + crossing for block in segment.blocks)

    def activation_limit(self, segment: Segment, workload: Workload, rows: int) -> int:
        # Widest point: q, k, v, the hidden states and the feed-forward, each allowed a float32 copy.
        channels = 12 * self.width + self.feed_forward_width
        tokens = self.tokens(workload) + workload.text_length + self.context_tokens
        return rows * tokens * channels * 4 + (8 << 20)


class CrossAttentionSegment(DiTSegment):
    """Blocks of which only the self-attention mixes video tokens."""

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        """Queries or keys of (rows, tokens, channels), rotated in float32 and then cast to `dtype`."""
        raise TypeError(f"{type(self).__name__} does not define rotary")

    def self_attention(self, attn: Any, x: Tensor, state: State, perturbed: bool) -> Tensor:
        """Attention with RoPE; to_out(V) for rows whose attention is skipped (stg-a)."""
        value = attn.to_v(x)
        if perturbed:
            mixed = value
        else:
            query, key = self.normed_and_rotated(attn, attn.to_q(x), attn.to_k(x), state)
            mixed = self.heads(attn, query, key, value)
        if KEEP_ATTENTION in state and not perturbed:
            mixed = torch.where(state[KEEP_ATTENTION][:, None, None], mixed, value)
        out: Tensor = attn.to_out[0](mixed)
        return out

    def normed_and_rotated(
        self, attn: Any, query: Tensor, key: Tensor, state: State
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys of the self-attention: RMS norm over all channels, then RoPE, in float32."""
        rope = state["rope_cos"], state["rope_sin"]
        if self.qk_norm_rope is not None:
            weights = attn.norm_q.weight, attn.norm_k.weight
            return self.qk_norm_rope(query, key, weights, rope, attn.norm_q.eps)
        normed = rms_norm(attn.norm_q, query), rms_norm(attn.norm_k, key)
        return self.rotary(normed[0], *rope, query.dtype), self.rotary(normed[1], *rope, key.dtype)

    def cross_attention(
        self, attn: Any, x: Tensor, text: Tensor, bias: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        """Attention to the projected text, under its additive mask if it has one.

        That to projected tokens of a picture is added: a softmax of its own.
        """
        query = rms_norm(attn.norm_q, attn.to_q(x)).to(x.dtype)
        key = rms_norm(attn.norm_k, attn.to_k(text)).to(x.dtype)
        attended = self.heads(attn, query, key, attn.to_v(text), bias)
        if image is not None:
            # The same scores, exactly, by another scale: TensorRT-RTX 1.7.1 crashes while it compiles two
            # attentions that share their queries and their scale.
            seen = 2 * rms_norm(attn.norm_added_k, attn.add_k_proj(image)).to(x.dtype)
            scale = 0.5 * (query.shape[2] // attn.heads) ** -0.5
            attended = attended + self.heads(attn, query, seen, attn.add_v_proj(image), scale=scale)
        out: Tensor = attn.to_out[0](attended)
        return out
