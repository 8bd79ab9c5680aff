"""The shared part of diffusion transformers: blocks in a row, tokens on a grid of patches, RoPE tables.

A segment is a run of a transformer's own blocks, with the embedding before or the head after them. Tokens
cross a cut as (rows, *grid, channels), so that the back knows the grid it unpatches to.
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
from stg_trt.models.config_file import positive_integer
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.families.keep_flags import keep_attention_spec
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.float8 import Float8Rule
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.models.workload import Workload

State = dict[str, Tensor]


class DiT(ModelFamily):
    """Sizes and weights; how blocks attend to the text is the subclasses'."""

    has_text_segment = True
    float8 = Float8Rule()
    # The transformer's list of blocks; what every block reads and no step changes; the weights that stay
    # float32, as a regular expression.
    blocks_name: ClassVar[str]
    block_constants: tuple[str, ...]
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

    def vae_integer(self, name: str, published: int) -> int:
        """A positive integer of the VAE's configuration; without one or the entry, the published VAE's."""
        return positive_integer((self.vae_config or {}).get(name, published), name, "vae/config.json")

    @property
    @abstractmethod
    def patch(self) -> tuple[int, int, int]:
        """Latents per token in time, height and width."""

    @abstractmethod
    def own_tensors(self, workload: Workload) -> tuple[TensorSpec, ...]:
        """All but timestep, prompt embeddings and keep input: latents, tensors at cuts, constants."""

    def block_of(self, weight_name: str) -> int | None:
        match = re.match(rf"{self.blocks_name}\.(\d+)\.", weight_name)
        return int(match[1]) if match else None

    def blocks(self, transformer: Any) -> Sequence[nn.Module]:
        """The transformer's blocks in the order of their numbers."""
        found: Sequence[nn.Module] = getattr(transformer, self.blocks_name)
        return found

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
        return self.latent_channels, frames, workload.height // spatial, workload.width // spatial

    @property
    def latent_channels(self) -> int:
        """Channels of the video's latents; the transformer may take more, of a condition."""
        return self.integer("in_channels")

    def grid(self, workload: Workload) -> tuple[int, int, int]:
        """Tokens in time, height and width."""
        _, *latents = self.latent_shape(workload)
        frames, height, width = (size // patch for size, patch in zip(latents, self.patch, strict=True))
        return frames, height, width

    def tokens(self, workload: Workload) -> int:
        """Video tokens."""
        return math.prod(self.grid(workload))

    def tensors(self, workload: Workload) -> dict[str, TensorSpec]:
        embeds = (ROWS, workload.text_length, self.text_channels)
        specs = (
            TensorSpec("timestep", "float32", (ROWS,)),
            TensorSpec("prompt_embeds", workload.dtype, embeds),
            *self.own_tensors(workload),
            keep_attention_spec(),
        )
        return {spec.name: spec for spec in specs}

    def text_module(self, transformer: Any, *borders: Any) -> SegmentModule:
        """The text segment of a family that has one."""
        raise TypeError(f"{type(self).__name__} does not define text_module")

    def module(self, transformer: nn.Module, segment: Segment, *, expand_masks: bool) -> SegmentModule:
        borders = (*self.borders(segment), expand_masks)
        if segment.text:
            return self.text_module(transformer, *borders)
        module = self.segment_class(segment, self.blocks(transformer), self.patch, *borders)
        if segment.front:
            module.take_embedding(transformer)
        if segment.back:
            module.take_head(transformer)
        return module

    def lower_precision(self, module: SegmentModule, dtype: torch.dtype) -> None:
        for name, parameter in module.named_parameters():
            if not re.search(self.float32_islands, name):
                parameter.data = parameter.data.to(dtype)


class TextProjection(SegmentModule):
    """Projects prompt embeddings to the model's width, once per call."""

    def __init__(self, projection: nn.Module, *borders: Any) -> None:
        super().__init__(*borders)
        self.projection = projection

    def run(self, tensors: State) -> State:
        return {"text": self.projection(tensors["prompt_embeds"])}


class DiTSegment(SegmentModule):
    """Embedding, blocks and head over a transformer's own submodules, with float32 islands."""

    # Blocks that attend to a part of the grid want their tokens on it.
    flattens_grid: ClassVar[bool] = True

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

    def latent_grid(self, latents: Tensor) -> tuple[int, ...]:
        """Tokens in time, height and width of (rows, channels, frames, height, width)."""
        return tuple(size // patch for size, patch in zip(latents.shape[2:], self.patch, strict=True))

    def embed(self, state: State) -> State:
        """The front's results from its inputs: hidden states (rows, tokens, channels) and the rest."""
        raise TypeError(f"{type(self).__name__} does not define embed")

    def block(self, block: Any, state: State, perturbed: bool) -> State:
        """The streams after one block; `perturbed` skips its self-attention for all rows (stg-a)."""
        raise TypeError(f"{type(self).__name__} does not define block")

    def head(self, state: State) -> Tensor:
        """The prediction, one entry per token."""
        raise TypeError(f"{type(self).__name__} does not define head")

    def heads(
        self,
        attn: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Splits (rows, tokens, channels) into heads, attends and joins them again."""
        split = [x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)]
        return self.attend(split[0], split[1], split[2], bias, scale).transpose(1, 2).flatten(2)

    def unpatch(self, pred: Tensor, grid: tuple[int, ...]) -> Tensor:
        """One entry per token to the layout of the latents; unchanged if tokens are latents."""
        return pred

    def run(self, tensors: State) -> State:
        state = dict(tensors)
        if self.segment.front:
            grid = self.latent_grid(state["latents"])
            state |= self.embed(state)
        else:
            grid = tuple(state["hidden_states"].shape[1:-1])
            if self.flattens_grid:
                state["hidden_states"] = state["hidden_states"].flatten(1, -2)
        skipped = self.segment.skipped
        for block in self.segment.blocks:
            mode = skipped.mode if skipped and block in skipped.blocks else None
            if mode != "stg-r":
                state |= self.block(self.blocks[str(block)], state, mode == "stg-a")
        if self.segment.back:
            state["pred"] = self.unpatch(self.head(state), grid)
        elif self.flattens_grid:
            state["hidden_states"] = state["hidden_states"].unflatten(1, grid)
        return state


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + gate*update, in float32 and back."""
    return (x.float() + update.float() * gate).to(x.dtype)


def unpatched(pred: Tensor, grid: tuple[int, ...], patch: tuple[int, int, int]) -> Tensor:
    """Tokens of (patch in time, height, width, channels) to (rows, channels, frames, height, width)."""
    patches = pred.unflatten(2, (*patch, -1)).unflatten(1, grid)
    # (rows, tokens in time, height, width, latents in time, height, width, channels)
    latents: Tensor = patches.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return latents.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """RMS norm over the last axis, in float32; `norm` may have no weight."""
    normed: Tensor = F.rms_norm(x.float(), (x.shape[-1],), norm.weight, norm.eps)
    return normed


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotary embedding of neighbours: (a, b) -> (a*cos - b*sin, b*cos + a*sin), in float32, then in `dtype`.

    The tables have one entry per pair. Each half is cast before they are joined: the joined tensor may be
    written to memory, then in `dtype`, which is all that attention reads.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = a * cos - b * sin, b * cos + a * sin
    return torch.stack([half.to(dtype) for half in rotated], -1).flatten(-2)


def half_table(table: Tensor) -> Tensor:
    """One entry per pair of channels, of a table (.., channels) in which both channels of a pair have it."""
    assert torch.equal(table[..., ::2], table[..., 1::2])
    return table[..., ::2].contiguous()
