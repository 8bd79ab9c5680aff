"""What diffusion transformers share whose blocks are self-attention, cross-attention and feed-forward.

The text is projected once per call; RoPE tables are constant. Across a cut go the hidden states and two
tensors made of the timestep: the modulation of the blocks and that of the head.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stg_trt.errors import InvalidRequest
from stg_trt.families.base import (
    KEEP_ATTENTION,
    ModelFamily,
    SegmentModule,
    Workload,
    keep_attention_spec,
)
from stg_trt.segment import Segment
from stg_trt.tensor_spec import ROWS, TensorSpec

_ROPE = ("rope_cos", "rope_sin")


class CrossAttentionDiT(ModelFamily):
    """Sizes, borders and costs; a subclass adds its own tensors and writes its block out."""

    has_text_segment = True
    # The transformer's list of blocks; what the front makes of the timestep for every block and for the head;
    # what every block reads and no step changes; the weights that stay float32, as a regular expression.
    blocks_name: ClassVar[str]
    modulation: ClassVar[str]
    head_modulation: ClassVar[str]
    block_constants: ClassVar[tuple[str, ...]]
    float32_islands: ClassVar[str]
    segment_class: ClassVar[type[DiTSegment]]

    @property
    def num_blocks(self) -> int:
        return self.integer("num_layers")

    @property
    def width(self) -> int:
        """Channels of the hidden states."""
        return self.integer("num_attention_heads") * self.integer("attention_head_dim")

    @property
    @abstractmethod
    def feed_forward_width(self) -> int:
        """Channels between the two projections of the feed-forward."""

    @property
    @abstractmethod
    def text_channels(self) -> int:
        """Channels of the prompt embeddings."""

    @property
    @abstractmethod
    def timestep_channels(self) -> int:
        """Channels of the timestep's sines and cosines."""

    @property
    @abstractmethod
    def compression(self) -> tuple[int, int]:
        """Pixels per latent in time and in space, from the VAE's configuration or the published VAE's."""

    @property
    @abstractmethod
    def patch(self) -> tuple[int, int, int]:
        """Latents per token in time, height and width."""

    @abstractmethod
    def own_tensors(self, workload: Workload) -> tuple[TensorSpec, ...]:
        """Latents, hidden states, prediction, both modulations; constants of the blocks but the text."""

    @abstractmethod
    def text_projection(self, transformer: Any) -> nn.Module:
        """The transformer's projection of the prompt embeddings to its width."""

    def block_of(self, weight_name: str) -> int | None:
        match = re.match(rf"{self.blocks_name}\.(\d+)\.", weight_name)
        return int(match[1]) if match else None

    def check(self, workload: Workload) -> None:
        temporal, spatial = self.compression
        _, *patch = self.patch
        for side, latents in zip(("height", "width"), patch, strict=True):
            pixels, multiple = getattr(workload, side), spatial * latents
            if pixels <= 0 or pixels % multiple:
                raise InvalidRequest(
                    f"{side}: expected a positive multiple of {multiple}, got {pixels}: "
                    f"use {max(multiple, round(pixels / multiple) * multiple)}"
                )
        if workload.num_frames <= 0 or (workload.num_frames - 1) % temporal:
            nearest = max(0, round((workload.num_frames - 1) / temporal)) * temporal + 1
            raise InvalidRequest(
                f"num_frames: expected {temporal}k+1, got {workload.num_frames}: use {nearest}"
            )
        if workload.text_length <= 0:
            raise InvalidRequest(
                f"text_length: expected a positive number of tokens, got {workload.text_length}: "
                f"use {self.defaults.text_length}"
            )

    def latent_shape(self, workload: Workload) -> tuple[int, int, int, int]:
        temporal, spatial = self.compression
        frames = (workload.num_frames - 1) // temporal + 1
        return self.integer("in_channels"), frames, workload.height // spatial, workload.width // spatial

    def grid(self, workload: Workload) -> tuple[int, int, int]:
        """Tokens in time, height and width."""
        _, *latents = self.latent_shape(workload)
        frames, height, width = (size // patch for size, patch in zip(latents, self.patch, strict=True))
        return frames, height, width

    def tokens(self, workload: Workload) -> int:
        """Video tokens."""
        return math.prod(self.grid(workload))

    def tensors(self, workload: Workload) -> dict[str, TensorSpec]:
        text, width, dtype = workload.text_length, self.width, workload.dtype
        specs = (
            TensorSpec("timestep", "float32", (ROWS,)),
            TensorSpec("prompt_embeds", dtype, (ROWS, text, self.text_channels)),
            TensorSpec("text", dtype, (ROWS, text, width)),
            *self.own_tensors(workload),
            keep_attention_spec(),
        )
        return {spec.name: spec for spec in specs}

    def borders(self, segment: Segment) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if segment.text:
            return ("prompt_embeds",), ("text",)
        read = (self.modulation, *self.block_constants) if segment.blocks else ()
        if segment.skipped is not None and segment.skipped.blocks == tuple(segment.blocks):
            unused = _ROPE if segment.skipped.mode == "stg-a" else read
            read = tuple(name for name in read if name not in unused)
        if segment.front:
            # The front makes the modulation that its own blocks read.
            inputs = ("latents", "timestep", *(name for name in read if name != self.modulation))
        else:
            inputs = ("hidden_states", *read)
        if segment.keep_input:
            inputs += (KEEP_ATTENTION,)
        if segment.back:
            return inputs if segment.front else (*inputs, self.head_modulation), ("pred",)
        made = (self.modulation, self.head_modulation) if segment.front else ()
        return inputs, ("hidden_states", *made)

    def module(self, transformer: nn.Module, segment: Segment, *, expand_masks: bool) -> SegmentModule:
        borders = self.borders(segment)
        if segment.text:
            return _TextProjection(self.text_projection(transformer), *borders, expand_masks)
        blocks = getattr(transformer, self.blocks_name)
        module = self.segment_class(segment, blocks, self.patch, *borders, expand_masks)
        if segment.front:
            module.take_embedding(transformer)
        if segment.back:
            module.take_head(transformer)
        return module

    def lower_precision(self, module: SegmentModule, dtype: torch.dtype) -> None:
        for name, parameter in module.named_parameters():
            if not re.search(self.float32_islands, name):
                parameter.data = parameter.data.to(dtype)

    def segment_flops(self, segment: Segment, workload: Workload) -> int:
        tokens, text, width = self.tokens(workload), workload.text_length, self.width
        if segment.text:
            return 2 * text * width * (self.text_channels + width)
        cross = 2 * tokens * 2 * width**2 + 2 * text * 2 * width**2 + 4 * tokens * text * width
        feed_forward = 2 * tokens * 2 * width * self.feed_forward_width
        self_attention = 2 * tokens * 4 * width**2 + 4 * tokens**2 * width
        values_only = 2 * tokens * 2 * width**2
        total = 0
        for block in segment.blocks:
            skipped = segment.skipped is not None and block in segment.skipped.blocks
            if skipped and segment.skipped is not None and segment.skipped.mode == "stg-r":
                continue
            total += cross + feed_forward + (values_only if skipped else self_attention)
        latents = math.prod(self.patch)
        if segment.front:
            total += 2 * tokens * width * latents * self.integer("in_channels")
            total += 2 * width * (self.timestep_channels + 7 * width)
        if segment.back:
            total += 2 * tokens * width * latents * self.integer("out_channels")
        return total

    def attentions(self, segment: Segment) -> int:
        skipped = segment.skipped.blocks if segment.skipped else ()
        per_skipped = 1 if segment.skipped and segment.skipped.mode == "stg-a" else 0
        return sum(per_skipped if block in skipped else 2 for block in segment.blocks)

    def activation_limit(self, segment: Segment, workload: Workload, rows: int) -> int:
        # Widest point: q, k, v, the hidden states and the feed-forward, each allowed a float32 copy.
        channels = 12 * self.width + self.feed_forward_width
        return rows * (self.tokens(workload) + workload.text_length) * channels * 4 + (8 << 20)


class _TextProjection(SegmentModule):
    """Projects prompt embeddings to the model's width, once per call."""

    def __init__(self, projection: nn.Module, *borders: Any) -> None:
        super().__init__(*borders)
        self.projection = projection

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"text": self.projection(tensors["prompt_embeds"])}


class DiTSegment(SegmentModule):
    """Embedding, blocks and head over a transformer's own submodules, with float32 islands."""

    def __init__(
        self,
        segment: Segment,
        blocks: Sequence[nn.Module],
        patch: tuple[int, int, int],
        *borders: Any,
    ) -> None:
        super().__init__(*borders)
        self.segment = segment
        self.patch = patch
        self.blocks = nn.ModuleDict({str(i): blocks[i] for i in segment.blocks})

    def take_embedding(self, transformer: Any) -> None:
        """Keeps what the front needs of the transformer."""
        raise TypeError(f"{type(self).__name__} does not define take_embedding")

    def take_head(self, transformer: Any) -> None:
        """Keeps what the back needs of the transformer."""
        raise TypeError(f"{type(self).__name__} does not define take_head")

    def embed(self, latents: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """Hidden states of (rows, tokens, channels) and both modulations, by name."""
        raise TypeError(f"{type(self).__name__} does not define embed")

    def block(self, block: Any, state: dict[str, Tensor], values_only: bool) -> Tensor:
        """The hidden states after one block; `values_only` skips its self-attention (stg-a)."""
        raise TypeError(f"{type(self).__name__} does not define block")

    def head(self, state: dict[str, Tensor]) -> Tensor:
        """The prediction, one entry per token."""
        raise TypeError(f"{type(self).__name__} does not define head")

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates queries or keys of (rows, tokens, channels), in float32."""
        raise TypeError(f"{type(self).__name__} does not define rotary")

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        state = dict(tensors)
        if self.segment.front:
            state |= self.embed(state["latents"], state["timestep"])
        skipped = self.segment.skipped
        for block in self.segment.blocks:
            mode = skipped.mode if skipped and block in skipped.blocks else None
            if mode != "stg-r":
                state["hidden_states"] = self.block(self.blocks[str(block)], state, mode == "stg-a")
        if self.segment.back:
            state["pred"] = self.head(state)
        return state

    def self_attention(self, attn: Any, x: Tensor, state: dict[str, Tensor], values_only: bool) -> Tensor:
        """Attention with RoPE; to_out(V) for rows whose attention is skipped (stg-a)."""
        value = attn.to_v(x)
        if values_only:
            mixed = value
        else:
            rope = state["rope_cos"], state["rope_sin"]
            query = self.rotary(rms_norm(attn.norm_q, attn.to_q(x)), *rope).to(x.dtype)
            key = self.rotary(rms_norm(attn.norm_k, attn.to_k(x)), *rope).to(x.dtype)
            mixed = self.heads(attn, query, key, value)
        if KEEP_ATTENTION in state and not values_only:
            mixed = torch.where(state[KEEP_ATTENTION][:, None, None], mixed, value)
        out: Tensor = attn.to_out[0](mixed)
        return out

    def cross_attention(self, attn: Any, x: Tensor, text: Tensor, bias: Tensor | None = None) -> Tensor:
        """Attention to the projected text, under its additive mask where there is one."""
        query = rms_norm(attn.norm_q, attn.to_q(x)).to(x.dtype)
        key = rms_norm(attn.norm_k, attn.to_k(text)).to(x.dtype)
        out: Tensor = attn.to_out[0](self.heads(attn, query, key, attn.to_v(text), bias))
        return out

    def heads(
        self, attn: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Splits (rows, tokens, channels) into heads, attends and joins them again."""
        split = [x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)]
        return self.attend(split[0], split[1], split[2], bias).transpose(1, 2).flatten(2)


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """RMS norm over all channels, in float32."""
    normed: Tensor = F.rms_norm(x.float(), (x.shape[-1],), norm.weight, norm.eps)
    return normed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs: (a, b) -> (a*cos - b*sin, b*cos + a*sin)."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return x * cos + rotated * sin
