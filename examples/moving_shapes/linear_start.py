"""A starting point for the VAE: the best linear code of 8x8 patches, written into its convolutions.

From random weights the VAE needs very long to get even as sharp as a principal component analysis of the
patches. So the analysis is done first, and training only has to improve on it. Its pieces are nonlinear, but
can represent a linear map: a residual block with a zero second convolution does nothing, a constant channel
much larger than the rest makes the normalisation a constant factor, and silu(x) - silu(-x) = x.

A few channels hold the change since the frame before instead. Without them a frame of a shape that moves left
is that of one that moves right, and the transformer has to learn the way from the order of the frames alone.
"""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo
from torch import Tensor, nn

from .clips import clips

CONSTANT = 64.0
CHANGE_CHANNELS = 6


def to_patches(video: Tensor, patch: int) -> Tensor:
    """The patches [count, channels] of a video, their channels in the order that the VAE uses."""
    batch, channels, frames, height, width = video.shape
    grid = video.reshape(batch, channels, frames, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 3, 5, 1, 6, 4).flatten(0, 3).flatten(1)


def principal_components(count: int, patch: int, seed: int) -> tuple[Tensor, Tensor]:
    """The background patch, and the leading directions [count, channels] of the patches around it."""
    batch = np.stack([clip for _, clip in islice(clips(seed), 384)])
    patches = to_patches(torch.from_numpy(batch).permute(0, 4, 1, 2, 3) * 2 - 1, patch)
    background = patches.median(dim=0).values
    centred = patches - background
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return background, vectors.flip(1).T[:count].contiguous()


def set_centre(conv: nn.Conv3d, weight: Tensor, bias: Tensor, frame_tap: int) -> None:
    """Let a 3x3x3 convolution look only at its own position."""
    conv.weight.zero_()
    conv.weight[: len(weight), :, frame_tap, 1, 1] = weight
    assert conv.bias is not None
    conv.bias.zero_()
    conv.bias[: len(bias)] = bias


def split_signs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as (+, -) pairs, and the matrix that puts the pairs together again after normalisation and SiLU.

    There is room for a pair of all rows but the last, which has one channel: silu(x) is about x / 2.
    """
    pairs = torch.stack([weight, -weight], dim=1).flatten(0, 1)[:-1]
    width = len(pairs) + 1
    merge = torch.zeros(len(weight), width)
    for row in range(len(weight)):
        merge[row, 2 * row], merge[row, 2 * row + 1] = 1.0, -1.0
    merge[-1, -2:] = torch.tensor([2.0, 0.0])
    return pairs, merge * CONSTANT / width**0.5


@torch.no_grad()
def start_linear(vae: AutoencoderKLLTXVideo, seed: int) -> None:
    """Set the weights so that the VAE encodes into, and decodes from, the principal components."""
    latent_channels = vae.config.latent_channels
    kept = latent_channels - CHANGE_CHANNELS
    background, components = principal_components(kept, vae.config.patch_size, seed)
    for name, param in vae.named_parameters():
        if ".conv2." in name:
            param.zero_()
    last = torch.zeros(2 * latent_channels)
    last[-1] = CONSTANT

    pairs, merge = split_signs(torch.cat([components, components[:CHANGE_CHANNELS]]))
    pairs = torch.cat([pairs, torch.zeros_like(pairs[:1])])
    offset = pairs @ background
    offset[2 * kept :] = 0.0
    conv_in = vae.encoder.conv_in.conv
    set_centre(conv_in, pairs, last - offset, frame_tap=2)
    conv_in.weight[2 * kept :, :, 1, 1, 1] = -pairs[2 * kept :]
    set_centre(vae.encoder.conv_out.conv, merge, torch.zeros(latent_channels), frame_tap=2)

    pairs, merge = split_signs(torch.eye(latent_channels))
    pairs = torch.cat([pairs, torch.zeros_like(pairs[:1])])
    set_centre(vae.decoder.conv_in.conv, pairs, last, frame_tap=1)
    unmoved = torch.cat([components, torch.zeros(CHANGE_CHANNELS, components.shape[1])])
    set_centre(vae.decoder.conv_out.conv, unmoved.T @ merge, background, frame_tap=1)
