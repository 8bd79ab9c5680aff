"""STDiT3, the transformer of Open-Sora 1.2, as a plain torch module under the checkpoint's names.

Written from the description of the model and of its weights. Spatial and temporal blocks take turns and
differ in one thing: a spatial block attends inside a frame, a temporal one along time, with RoPE. Hidden
states are (rows, frames, height, width, channels), counted in patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stg_trt.models.families.dit import gated, rms_norm, rotate, unpatched

EPS = 1e-6
TIMESTEP_CHANNELS = 256
_THETA = 10000.0
Rope = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Of queries, keys, values (sequences, heads, tokens, channels) and an additive mask over keys."""
Mix = Callable[["SelfAttention", Tensor, Rope | None], Tensor]
"""Of a self-attention and its input (rows, sequences, tokens, channels)."""


class HeadNorm(nn.Module):
    """The weight of an RMS norm over the channels of a head."""

    eps: ClassVar[float] = EPS

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))


class SelfAttention(nn.Module):
    """One product for queries, keys and values, in this order, the heads inside of each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = HeadNorm(width // heads), HeadNorm(width // heads)
        self.proj = nn.Linear(width, width)
        # Replaced by one that skips the attention, in the way of diffusers' attentions.
        self.processor: Mix = attended

    def value(self, x: Tensor) -> Tensor:
        """The values alone, in the layout of `x`."""
        width = x.shape[-1]
        return F.linear(x, self.qkv.weight[2 * width :], self.qkv.bias[2 * width :])

    def qkv_heads(self, x: Tensor, rope: Rope | None) -> list[Tensor]:
        """Queries, keys and values of (.., tokens, channels) as (.., heads, tokens, channels of a head)."""
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        query, key, value = (part.transpose(-3, -2) for part in split)
        normed = rms_norm(self.q_norm, query), rms_norm(self.k_norm, key)
        if rope is None:
            return [*(part.to(x.dtype) for part in normed), value]
        return [*(rotate(part, *rope, x.dtype) for part in normed), value]


class CrossAttention(nn.Module):
    """Attention of the video's tokens to the projected text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, bias: Tensor, attend: Attend) -> Tensor:
        """Of hidden states on their grid and a text (rows, tokens, channels) under an additive mask."""
        key, value = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        query = self.q_linear(x.flatten(1, 3)).unflatten(-1, (self.heads, -1))
        seen = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), bias)
        return on_grid(self.proj(seen.transpose(1, 2).flatten(2)), 1, x.shape[1:4])


class FeedForward(nn.Module):
    """Two products around a GELU in its tanh form."""

    def __init__(self, channels: int, inner: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; the first and the last modulated, in float32."""

    temporal: ClassVar[bool]

    def __init__(self, width: int, heads: int, feed_forward_width: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))
        self.attn = SelfAttention(width, heads)
        self.cross_attn = CrossAttention(width, heads)
        self.mlp = FeedForward(width, feed_forward_width, width)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        text_bias: Tensor,
        modulation: Tensor,
        rope: Rope | None,
        mix: Mix | None = None,
        attend: Attend = F.scaled_dot_product_attention,
    ) -> Tensor:
        """The hidden states after the block; a temporal one reads `rope`.

        `mix` is the self-attention, the processor's if it is None, and `attend` the operation inside of the
        cross-attention.
        """
        hidden = hidden_states
        shift, scale, gate, shift_ff, scale_ff, gate_ff = parts(self.scale_shift_table + modulation)
        mixed = self.mixed(modulated(hidden, shift, scale), rope, mix or self.attn.processor)
        hidden = gated(hidden, mixed, gate)
        hidden = hidden + self.cross_attn(hidden, encoder_hidden_states, text_bias, attend)
        return gated(hidden, self.mlp(modulated(hidden, shift_ff, scale_ff)), gate_ff)

    def mixed(self, x: Tensor, rope: Rope | None, mix: Mix) -> Tensor:
        """The self-attention inside of each frame, or along the time of each place."""
        by_frame = x.flatten(2, 3)
        if self.temporal:
            mixed = mix(self.attn, by_frame.transpose(1, 2), rope).transpose(1, 2)
        else:
            mixed = mix(self.attn, by_frame, None)
        return on_grid(mixed, 2, x.shape[2:4])


class SpatialBlock(Block):
    """A frame's tokens attend to each other."""

    temporal = False


class TemporalBlock(Block):
    """The tokens of one place attend to each other, with their time as position."""

    temporal = True


class Embedder(nn.Module):
    """Sines and cosines of a number through an MLP: `mlp` is linear, SiLU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, values: Tensor) -> Tensor:
        from diffusers.models.embeddings import get_timestep_embedding

        waves = get_timestep_embedding(
            values, TIMESTEP_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        out: Tensor = self.mlp(waves)
        return out


class Caption(nn.Module):
    """The projection of the text, and the embeddings that stand for no text."""

    y_embedding: Tensor

    def __init__(self, tokens: int, channels: int, width: int) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.zeros(tokens, channels))
        self.y_proj = FeedForward(channels, width, width)


class PatchEmbedding(nn.Module):
    """Patches of one frame, with the positions of that frame's tokens."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(channels, width, patch, patch)

    def forward(self, latents: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = self.proj(latents).permute(0, 2, 3, 4, 1)
        return (hidden.float() + on_grid(positions, 0, hidden.shape[2:4])).to(hidden.dtype)


class FinalLayer(nn.Module):
    """A modulated norm, and the product to the latents of a patch: their velocity, then their variance."""

    def __init__(self, width: int, latents: int, channels: int) -> None:
        super().__init__()
        self.latents = latents
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))
        self.linear = nn.Linear(width, latents * channels)

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """The velocity from data to noise, as diffusers' solver has it; upstream's has the other sign."""
        shift, scale = parts(self.scale_shift_table + temb[:, None])
        product = self._of_velocity(self.linear.weight), self._of_velocity(self.linear.bias)
        return -F.linear(modulated(hidden, shift, scale), *product)

    def _of_velocity(self, product: Tensor) -> Tensor:
        by_latent: Tensor = product.unflatten(0, (self.latents, 2, -1))
        return by_latent[:, 0].flatten(0, 1)


class STDiT3(nn.Module):
    """The whole network; the keys of its state are those of the checkpoint."""

    # diffusers' name for parts that stay in float32 when the others do not.
    _keep_in_fp32_modules: ClassVar[tuple[str, ...]] = (
        "t_embedder",
        "fps_embedder",
        "t_block",
        "scale_shift_table",
        "q_norm",
        "k_norm",
    )

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, heads = config["hidden_size"], config["num_heads"]
        feed_forward = int(width * config["mlp_ratio"])
        frames, rows, columns = config["patch_size"]
        patch = (frames, rows, columns)
        channels: int = config["in_channels"]
        self.patch = patch
        self.x_embedder = PatchEmbedding(channels, width, patch)
        self.t_embedder, self.fps_embedder = Embedder(width), Embedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = Caption(config["model_max_length"], config["caption_channels"], width)
        sizes = (width, heads, feed_forward)
        self.spatial_blocks = nn.ModuleList(SpatialBlock(*sizes) for _ in range(config["depth"]))
        self.temporal_blocks = nn.ModuleList(TemporalBlock(*sizes) for _ in range(config["depth"]))
        self.final_layer = FinalLayer(width, frames * rows * columns, 2 * channels)
        self.rope = nn.Module()
        self.rope.register_buffer("freqs", rope_frequencies(width // heads))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> STDiT3:
        """The network with new weights; raises KeyError for a configuration without one of its sizes."""
        return cls(config)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_bias: Tensor,
        positions: Tensor,
        fps: Tensor,
        rope: Rope,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The velocity of latents (rows, channels, frames, height, width); called as in diffusers."""
        temb = self.t_embedder(timestep) + self.fps_embedder(fps)
        modulation = self.t_block(temb).unflatten(1, (6, -1))
        text = self.y_embedder.y_proj(encoder_hidden_states)
        hidden = self.x_embedder(hidden_states, positions)
        for block in self.running_order:
            hidden = block(hidden, text, text_bias, modulation, rope)
        patches = self.final_layer(hidden, temb).flatten(1, 3)
        return (unpatched(patches, tuple(hidden.shape[1:4]), self.patch),)

    @property
    def running_order(self) -> list[Block]:
        """The blocks as they run: the first spatial, the first temporal, the second spatial, .."""
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return [block for pair in pairs for block in pair if isinstance(block, Block)]


def rope_frequencies(channels: int) -> Tensor:
    """Radians per frame of each pair of a head's channels."""
    return 1.0 / _THETA ** (torch.arange(0, channels, 2).float() / channels)


def rope_tables(frames: int, channels: int) -> Rope:
    """Cosines and sines (frames, pairs of channels)."""
    angles = torch.outer(torch.arange(frames).float(), rope_frequencies(channels))
    return angles.cos(), angles.sin()


def position_table(grid: tuple[int, int], pixels: tuple[int, int], trained: int, width: int) -> Tensor:
    """What is added to the tokens of a frame (height*width, channels), for its column and its row.

    Coordinates are those of a square of `trained` pixels a side, which the sides of the frame are scaled to.
    """
    rows, columns = grid
    scale = (pixels[0] * pixels[1]) ** 0.5 / trained
    base = round((rows * columns) ** 0.5)
    half = width // 2
    frequencies = 1.0 / _THETA ** (torch.arange(0, half, 2).float() / half)

    def waves(count: int) -> Tensor:
        places = torch.arange(count).float() / scale * base / count
        angles = torch.outer(places, frequencies)
        return torch.cat([angles.sin(), angles.cos()], -1)

    of_columns = waves(columns)[None].expand(rows, -1, -1)
    of_rows = waves(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([of_columns, of_rows], -1).flatten(0, 1)


def attended(attn: SelfAttention, hidden_states: Tensor, rope: Rope | None) -> Tensor:
    """The whole self-attention."""
    query, key, value = attn.qkv_heads(hidden_states, rope)
    seen = F.scaled_dot_product_attention(query, key, value)
    out: Tensor = attn.proj(seen.transpose(2, 3).flatten(3))
    return out


def parts(modulation: Tensor) -> list[Tensor]:
    """Shifts, scales and gates of (rows, parts, channels), for hidden states on their grid."""
    return [part[:, None, None, None] for part in modulation.unbind(1)]


def on_grid(tokens: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
    """An axis of tokens as several."""
    unflattened: Tensor = tokens.unflatten(axis, sizes)
    return unflattened


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """A layer norm without weights, scaled and shifted in float32, in the precision of `x`."""
    normed = F.layer_norm(x.float(), (x.shape[-1],), eps=EPS)
    return (normed * (1 + scale) + shift).to(x.dtype)
