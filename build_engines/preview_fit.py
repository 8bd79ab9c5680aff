"""Fits the map from latents to colours, which previews are made with, to the checkpoint's own VAE."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stg_trt.errors import StgTrtError
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.parts import load_vae_part
from stg_trt.models.preview import PreviewMap
from stg_trt.models.workload import Workload

_log = logging.getLogger(__name__)
# Latents along each side of a clip, and its frames, of which no VAE makes one latent.
_SIDE, _FRAMES = 8, 17
_BLOBS = 4
# Positions for each channel, so that the fit is one.
_POSITIONS = 8


def fit_preview(checkpoint: Checkpoint, workload: Workload) -> PreviewMap | None:
    """None for a checkpoint without a VAE that can encode; engines need none."""
    try:
        vae = load_vae_part(checkpoint, {"default": torch.float32}, workload).vae
    except StgTrtError as error:
        _log.info("no previews: %s", error)
        return None
    if not hasattr(vae, "encode"):
        _log.info("no previews: %s cannot encode", type(vae).__name__)
        return None
    channels, _, rows, _ = checkpoint.family.latent_shape(workload)
    convolutions = (part for part in vae.encoder.modules() if isinstance(part, nn.Conv2d | nn.Conv3d))
    encode = _encoded_pictures if isinstance(next(convolutions), nn.Conv2d) else _encoded
    generator = torch.Generator().manual_seed(0)
    latents, colours, positions = [], [], 0
    with torch.no_grad():
        while positions < _POSITIONS * channels:
            clip = blobs(_FRAMES, _SIDE * workload.height // rows, generator)
            made = encode(vae, clip)
            latents.append(_positions(made))
            colours.append(_positions(_colours(clip, made.shape[2], workload.height // rows)))
            positions += len(latents[-1])
    fitted = PreviewMap.of(torch.cat(latents), torch.cat(colours))
    _log.info("previews: R squared %.3f", fitted.fit)
    return fitted


def blobs(frames: int, side: int, generator: torch.Generator) -> Tensor:
    """A clip (1, 3, frames, side, side) in -1..1 of soft patches of all colours, which change slowly."""
    coarse = torch.randn(1, 3, 2, _BLOBS, _BLOBS, generator=generator)
    size = (frames, side, side)
    return functional.interpolate(coarse, size, mode="trilinear", align_corners=True).mul(1.5).tanh()


def _encoded(vae: Any, clip: Tensor) -> Tensor:
    latents: Tensor = vae.encode(clip).latent_dist.mode()
    return latents


def _encoded_pictures(vae: Any, clip: Tensor) -> Tensor:
    return _encoded(vae, clip[0].transpose(0, 1)).transpose(0, 1)[None]


def _colours(clip: Tensor, frames: int, spatial: int) -> Tensor:
    """The mean colour under each latent; the first stands for the first frame alone."""
    temporal = (clip.shape[2] - 1) // (frames - 1)
    rest = functional.avg_pool3d(clip[:, :, 1:], (temporal, spatial, spatial))
    first = functional.avg_pool3d(clip[:, :, :1], (1, spatial, spatial))
    return torch.cat([first, rest], 2)


def _positions(x: Tensor) -> Tensor:
    return x.movedim(1, -1).flatten(0, -2)
