"""The layers of a spatio-temporal UNet over diffusers' own submodules, with norms and mixing in float32.

Hidden states are (rows, frames, channels, height, width) between layers, and (rows, frames, height, width,
channels) between the halves of an attention module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Perturbed:
    """What becomes of a self-attention: `mode` in all rows, or in those whose flag (rows,) is false."""

    mode: str | None = None
    keep_attention: Tensor | None = None
    keep_layer: Tensor | None = None


class Resnet(nn.Module):
    """SpatioTemporalResBlock: a residual block over every frame, one over the frames, and their mixture."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.spatial, self.temporal = block.spatial_res_block, block.temporal_res_block
        self.mix_factor = block.time_mixer.mix_factor

    def forward(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """Also of the embedded timestep (rows, channels) in float32."""
        temb = F.silu(temb)
        spatial = self._over_frames(hidden, temb)
        temporal = self._across_frames(spatial.transpose(1, 2), temb).transpose(1, 2)
        return mixed(spatial, temporal, self.mix_factor)

    def _over_frames(self, hidden: Tensor, temb: Tensor) -> Tensor:
        block, frames = self.spatial, hidden.shape[1]
        flat = hidden.flatten(0, 1)
        inner = over_frames(block.conv1(activated(block.norm1, flat)), frames)
        inner = inner + projected(block.time_emb_proj, temb)[:, None, :, None, None]
        inner = block.conv2(activated(block.norm2, inner.flatten(0, 1)))
        shortcut = flat if block.conv_shortcut is None else block.conv_shortcut(flat)
        summed: Tensor = shortcut + inner
        return over_frames(summed, frames)

    def _across_frames(self, hidden: Tensor, temb: Tensor) -> Tensor:
        """Of (rows, channels, frames, height, width); its channels stay the same."""
        block = self.temporal
        inner = block.conv1(activated(block.norm1, hidden))
        inner = inner + projected(block.time_emb_proj, temb)[:, :, None, None, None]
        summed: Tensor = hidden + block.conv2(activated(block.norm2, inner))
        return summed


class SelfAttention(nn.Module):
    """Attention of tokens that are not those of other groups."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.heads = attn.heads
        self.to_q, self.to_k, self.to_v, self.to_out = attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]

    def forward(self, x: Tensor, perturbed: Perturbed) -> Tensor:
        """Of (rows, groups, tokens, channels). stg-a leaves to_out(V), and stg-r the input as it is."""
        if perturbed.mode == "stg-r":
            return x
        attended = value = self.to_v(x)
        if perturbed.mode != "stg-a":
            attended = self._attend(self.to_q(x), self.to_k(x), value)
        out: Tensor = self.to_out(_kept(perturbed.keep_attention, attended, value))
        return _kept(perturbed.keep_layer, out, x)

    def _attend(self, *projections: Tensor) -> Tensor:
        query, key, value = (
            x.flatten(0, 1).unflatten(2, (self.heads, -1)).transpose(1, 2) for x in projections
        )
        out = F.scaled_dot_product_attention(query, key, value)
        return over_frames(out.transpose(1, 2).flatten(2), projections[0].shape[1])


class OneTokenAttention(nn.Module):
    """Cross-attention to the picture's one token: its softmax is 1, so it is to_out(V) for any query."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.to_v, self.to_out = attn.to_v, attn.to_out[0]

    def forward(self, token: Tensor) -> Tensor:
        """(rows, 1, channels) to (rows, 1, 1, channels)."""
        out: Tensor = self.to_out(self.to_v(token))
        return out[:, None]


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn1 = block.norm1, SelfAttention(block.attn1)
        self.attn2 = OneTokenAttention(block.attn2)
        self.norm3, self.ff = block.norm3, block.ff

    def forward(self, x: Tensor, token: Tensor, perturbed: Perturbed) -> Tensor:
        """Of (rows, groups, tokens, channels) and the picture's token (rows, 1, channels)."""
        x = self.attn1(layer_norm(self.norm1, x), perturbed) + x
        x = self.attn2(token) + x
        out: Tensor = self.ff(layer_norm(self.norm3, x)) + x
        return out


class SpatialHalf(nn.Module):
    """The first half of TransformerSpatioTemporalModel, in which the tokens of a frame attend."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.norm, self.proj_in = attention.norm, attention.proj_in
        self.block = TransformerBlock(attention.transformer_blocks[0])

    def forward(self, hidden: Tensor, token: Tensor, perturbed: Perturbed) -> Tensor:
        """Hidden states between layers to those between halves."""
        frames, height = hidden.shape[1], hidden.shape[3]
        normed = group_norm(self.norm, hidden.flatten(0, 1)).to(hidden.dtype).unflatten(0, (-1, frames))
        tokens = self.proj_in(normed.permute(0, 1, 3, 4, 2).flatten(2, 3))
        out: Tensor = self.block(tokens, token, perturbed)
        places: Tensor = out.unflatten(2, (height, -1))
        return places


class TemporalHalf(nn.Module):
    """The second half, in which the frames of a place attend."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.time_proj, self.time_pos_embed = attention.time_proj, attention.time_pos_embed
        (block,) = attention.temporal_transformer_blocks
        self.norm_in, self.ff_in = block.norm_in, block.ff_in
        self.block = TransformerBlock(block)
        self.mix_factor = attention.time_mixer.mix_factor
        self.proj_out = attention.proj_out

    def forward(self, spatial: Tensor, residual: Tensor, token: Tensor, perturbed: Perturbed) -> Tensor:
        """Hidden states between halves, and those before the first, to hidden states between layers."""
        size = spatial.shape[2:4]
        places = spatial.flatten(2, 3).transpose(1, 2)
        frames = torch.arange(spatial.shape[1], device=spatial.device)
        positions = self.time_pos_embed(self.time_proj(frames)).to(spatial.dtype)
        temporal = places + positions
        temporal = self.ff_in(layer_norm(self.norm_in, temporal)) + temporal
        temporal = self.block(temporal, token, perturbed)
        out = self.proj_out(mixed(places, temporal, self.mix_factor))
        channels_first: Tensor = out.transpose(1, 2).unflatten(2, size).permute(0, 1, 4, 2, 3)
        return channels_first + residual


class Resample(nn.Module):
    """Halves or doubles height and width by a convolution of every frame."""

    def __init__(self, sampler: Any) -> None:
        super().__init__()
        self.conv = sampler.conv

    def forward(self, hidden: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Down, or up to a size, which is not double if halving has rounded it up."""
        flat = hidden.flatten(0, 1)
        resized = flat if size is None else F.interpolate(flat, size=size, mode="nearest")
        out: Tensor = self.conv(resized)
        return over_frames(out, hidden.shape[1])


def over_frames(flat: Tensor, frames: int) -> Tensor:
    """(rows * frames, ...) to (rows, frames, ...)."""
    x: Tensor = flat.unflatten(0, (-1, frames))
    return x


def activated(norm: Any, x: Tensor) -> Tensor:
    """SiLU of the group norm, in float32 and back."""
    return F.silu(group_norm(norm, x)).to(x.dtype)


def group_norm(norm: Any, x: Tensor) -> Tensor:
    """Group norm over channels, the second dimension, and all that follow, in float32."""
    return F.group_norm(x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps)


def layer_norm(norm: Any, x: Tensor) -> Tensor:
    """Layer norm over the last dimension, in float32 and back."""
    return F.layer_norm(x.float(), x.shape[-1:], norm.weight, norm.bias, norm.eps).to(x.dtype)


def mixed(spatial: Tensor, temporal: Tensor, factor: Tensor) -> Tensor:
    """a*spatial + (1 - a)*temporal with a = sigmoid(factor), in float32 and back."""
    alpha = factor.sigmoid()
    return (alpha * spatial.float() + (1 - alpha) * temporal.float()).to(spatial.dtype)


def projected(linear: nn.Module, temb: Tensor) -> Tensor:
    """A projection in the dtype of the weights, which are many."""
    assert isinstance(linear, nn.Linear)
    out: Tensor = linear(temb.to(linear.weight.dtype))
    return out


def _kept(keep: Tensor | None, x: Tensor, otherwise: Tensor) -> Tensor:
    """The rows of x that are kept, and those of `otherwise`; (rows, groups, tokens, channels) each."""
    return x if keep is None else torch.where(keep[:, None, None, None], x, otherwise)
