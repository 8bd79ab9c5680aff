"""Computes a VAE without training: a linear code of blocks of pixels, and a decoder that overlaps them.

From random weights, the VAE needs hours to become as sharp as a principal component analysis of the blocks.
So the encoder is that analysis, and is not trained. The decoder's convolutions also see the neighbours of a
position. Each of them is fitted by least squares to noisy latents, so that an error in one latent position is
smoothed with its neighbours rather than painted as a block. Training then improves on it (see `train`).

A residual block with a zero second convolution does nothing, and a constant channel much larger than the rest
makes a normalisation a constant factor, under which silu(x) is x / 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo
from diffusers.models.autoencoders.autoencoder_kl_ltx import (
    LTXVideoCausalConv3d,
    LTXVideoDecoder3d,
    LTXVideoEncoder3d,
    LTXVideoUpsampler3d,
)
from torch import Tensor, nn
from torch.nn import functional

from . import models
from .clips import BACKGROUND, Array, clips

ENCODER_CONSTANT, DECODER_CONSTANT = 1e4, 16.0
LATENT_NOISE = 0.1
"""Of the latents that the decoder is fitted to, relative to each channel's deviation."""
LOG_VARIANCE = -30.0
"""Of the VAE's posterior, whose samples are its mean then; diffusers takes nothing lower."""
FITTED_CLIPS, BATCH = 288, 24
FITTED_POSITIONS = 40_000
"""Per convolution, about."""
RIDGE = 1e-9
GREY = 2 * BACKGROUND - 1
"""The background in the VAE's -1..1."""


def to_video(batch: list[Array]) -> Tensor:
    """Clips as the VAE's input: [clip, channel, frame, row, column] in -1..1."""
    return torch.from_numpy(np.stack(batch)).permute(0, 4, 1, 2, 3) * 2 - 1


def fold(x: Tensor, frames: int, side: int) -> Tensor:
    """Moves blocks of positions into the channels; the first frame alone fills the first position's."""
    x = torch.cat([*[x[:, :, :1]] * (frames - 1), x], dim=2)
    x = x.unflatten(4, (-1, side)).unflatten(3, (-1, side)).unflatten(2, (-1, frames))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def rows_of(x: Tensor) -> Tensor:
    """The channels of every position: [position, channel]."""
    return x.movedim(1, -1).flatten(0, -2)


@dataclass(frozen=True)
class Code:
    """A linear code of blocks of pixels: 0 is background."""

    frames: int
    side: int
    components: Tensor
    """Its directions [channel of a block, component]."""

    @classmethod
    def of(cls, video: Tensor, frames: int, side: int, count: int) -> Code:
        """The principal components of the blocks of some clips."""
        rows = rows_of(fold(video - GREY, frames, side))
        _, vectors = torch.linalg.eigh(rows.T @ rows)
        return cls(frames, side, vectors.flip(1)[:, :count].contiguous())

    def encode(self, video: Tensor) -> Tensor:
        """The components [clip, component, frame, row, column] of a video."""
        return torch.einsum("bithw,ik->bkthw", fold(video - GREY, self.frames, self.side), self.components)


@torch.no_grad()
def compute_vae(vae: AutoencoderKLLTXVideo, seed: int) -> None:
    """Sets all weights of the VAE, and the mean and deviation of its latents."""
    video = to_video([clip for _, clip in islice(clips(seed), FITTED_CLIPS)])
    code = Code.of(video, models.PATCH_FRAMES, models.PATCH, models.LATENT_CHANNELS)
    latents = code.encode(video)
    compute_encoder(vae.encoder, video, latents)
    latents = linear_code(vae, video).encode(video)
    set_scale(vae, latents)
    deviation = latents.std(dim=(0, 2, 3, 4), keepdim=True)
    noisy = latents + LATENT_NOISE * deviation * torch.randn_like(latents)
    compute_decoder(vae.decoder, noisy, video)


@torch.no_grad()
def linear_code(vae: AutoencoderKLLTXVideo, video: Tensor) -> Code:
    """The code that a computed encoder amounts to: without its convolutions, it takes a tenth of the time."""
    parts = (part.to(vae.device) for part in video.split(BATCH))
    latents = torch.cat([vae.encode(part).latent_dist.mode().cpu() for part in parts])
    blocks = fold(video - GREY, models.PATCH_FRAMES, models.PATCH)
    weight, _ = least_squares([(rows_of(blocks), rows_of(latents))])
    return Code(models.PATCH_FRAMES, models.PATCH, weight.T.contiguous())


def set_scale(vae: AutoencoderKLLTXVideo, latents: Tensor) -> None:
    """The mean and deviation by which pipelines normalise latents.

    Channels keep the square root of their deviation, so that the transformer first learns what is seen most.
    """
    deviation = latents.std(dim=(0, 2, 3, 4))
    kept = deviation.sqrt() / deviation.mean().sqrt()
    vae.latents_mean.copy_(latents.mean(dim=(0, 2, 3, 4)))
    vae.latents_std.copy_(deviation / kept)


def clear(convolutions: Iterable[nn.Module]) -> None:
    """Sets all weights of some convolutions to zero."""
    for convolution in convolutions:
        for param in convolution.parameters():
            param.zero_()


def compute_encoder(encoder: LTXVideoEncoder3d, video: Tensor, latents: Tensor) -> None:
    """Lets the encoder compute given latents, from the components of blocks of half the sides and frames.

    Its first downsampler only rearranges pixels. The second adds means of its input to what it computes.
    """
    clear(layer for layer in encoder.modules() if isinstance(layer, nn.Conv3d))
    conv_in = encoder.conv_in.conv
    count = conv_in.in_channels
    conv_in.weight[:count, :, -1, 1, 1] = torch.eye(count)
    conv_in.bias[:count] = -GREY
    halved = torch.cat([given_to(encoder.down_blocks[1], encoder, part) for part in video.split(BATCH)])
    _, vectors = torch.linalg.eigh(rows_of(halved).T @ rows_of(halved))
    halving = encoder.down_blocks[1].downsamplers[0].conv.conv
    halving.weight[:-1, :, -1, 1, 1] = vectors.flip(1).T[: halving.out_channels - 1]
    halving.bias[-1] = ENCODER_CONSTANT
    conv_out = encoder.conv_out.conv
    features = torch.cat([given_to(encoder.conv_out, encoder, part) for part in video.split(BATCH)])
    weight, bias = least_squares([(rows_of(features), rows_of(latents))])
    conv_out.weight[:-1, :, -1, 1, 1] = weight
    conv_out.bias[:-1] = bias
    conv_out.bias[-1] = LOG_VARIANCE


def compute_decoder(decoder: LTXVideoDecoder3d, latents: Tensor, video: Tensor) -> None:
    """Fits one convolution after the other: to components of smaller blocks, then twice to pixels."""
    clear(block.conv2 for block in decoder.modules() if hasattr(block, "conv2"))
    clear([decoder.conv_in])
    channels = decoder.conv_in.conv.in_channels
    decoder.conv_in.conv.weight[:channels, :, -1, 1, 1] = torch.eye(channels)
    first, second = (block.upsamplers[0] for block in decoder.up_blocks)
    wide = decoder.conv_out.conv.in_channels
    middle = Code.of(video, models.PATCH_FRAMES // 2, models.PATCH // 2, wide - 1)
    patch = models.PATCH // 4
    fit_upsampler(first, decoder, latents, with_constant(middle.encode(video), wide))
    fit_upsampler(second, decoder, latents, with_constant(fold(video - GREY, 1, patch), wide))
    # The VAE puts the columns of a patch before its rows.
    pixels = fold(video, 1, patch).unflatten(1, (-1, patch, patch)).transpose(2, 3).flatten(1, 3)
    fit_convolution(decoder.conv_out, decoder, latents, pixels)


def with_constant(x: Tensor, channels: int) -> Tensor:
    """More channels: zeros, and a constant as the last, which keeps a normalisation from blowing up zeros."""
    more = torch.zeros_like(x[:, :1]).repeat(1, channels - x.shape[1], 1, 1, 1)
    more[:, -1] = DECODER_CONSTANT
    return torch.cat([x, more], dim=1)


def fit_upsampler(
    upsampler: LTXVideoUpsampler3d, decoder: LTXVideoDecoder3d, latents: Tensor, wanted: Tensor
) -> None:
    """Fits the convolution of an upsampler, which makes 2x2x2 positions of each and drops the first frame."""
    fit_convolution(upsampler.conv, decoder, latents, fold(wanted, 2, 2))


def fit_convolution(
    layer: LTXVideoCausalConv3d, decoder: LTXVideoDecoder3d, latents: Tensor, wanted: Tensor
) -> None:
    """Fits a 3x3x3 convolution of the decoder to its output [clip, channel, frame, row, column]."""
    share = FITTED_POSITIONS / wanted[:, 0].numel()

    def pairs() -> Iterable[tuple[Tensor, Tensor]]:
        for part, target in zip(latents.split(BATCH // 4), wanted.split(BATCH // 4), strict=True):
            chosen = torch.rand(target[:, 0].numel()) < share
            yield neighbourhoods(given_to(layer, decoder, part), chosen), rows_of(target)[chosen]

    weight, bias = least_squares(pairs())
    layer.conv.weight.copy_(weight.view_as(layer.conv.weight))
    layer.conv.bias.copy_(bias)


def given_to(layer: nn.Module, model: nn.Module, inputs: Tensor) -> Tensor:
    """What a layer of a model is given while the model runs."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(inputs)
    hook.remove()
    return seen[0]


def neighbourhoods(x: Tensor, chosen: Tensor) -> Tensor:
    """The 3x3x3 positions up to each chosen one, padded as by the decoder: [position, channel and place]."""
    x = torch.cat([x[:, :, :1], x[:, :, :1], x], dim=2)
    x = functional.pad(x, (1, 1, 1, 1))
    places = x.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)
    return places.movedim(1, 4).flatten(0, 3)[chosen].flatten(1)


def least_squares(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The weight [output, input] and bias of the linear map that fits outputs to inputs best, row by row."""
    gram, moment = torch.zeros(()), torch.zeros(())
    for inputs, outputs in pairs:
        extended = functional.pad(inputs, (0, 1), value=1.0).double()
        gram = gram + extended.T @ extended
        moment = moment + extended.T @ outputs.double()
    # Inputs that are all but zero get no weight, and those that are sums of others share theirs.
    size = gram.diagonal().clamp(min=1e-14 * float(gram.diagonal().max())).sqrt()
    scaled = gram / size / size[:, None] + RIDGE * torch.eye(len(gram), dtype=gram.dtype)
    solved = torch.linalg.solve(scaled, moment / size[:, None])
    solution = (solved / size[:, None]).float()
    return solution[:-1].T.contiguous(), solution[-1]
