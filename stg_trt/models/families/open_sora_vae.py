"""The VAE of Open-Sora 1.2 for decoding: a causal decoder in time, then diffusers' AutoencoderKL per frame.

Written from the description of the weights, whose names the modules have. The temporal decoder works on
five latent frames at a time, of which it makes twenty; what is not shown is cut off in front.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

# The temporal latents of 17 frames; each stands for 4, the first of them for one.
CHUNK_FRAMES = 17
_CHUNK_LATENTS = 5
_GROUPS = 32
# Upstream's, whatever the spatial configuration says.
_SPATIAL_SCALE = 0.18215
_SPATIAL_CONFIG = "spatial_config.json"
# The spatial part that the published weights are of; the repository does not have its configuration.
_PUBLISHED_SPATIAL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "norm_num_groups": 32,
}


# The temporal part of the published weights; a configuration need not repeat it.
_PUBLISHED_TEMPORAL: dict[str, Any] = {
    "in_out_channels": 4,
    "latent_embed_dim": 4,
    "embed_dim": 4,
    "filters": 128,
    "num_res_blocks": 4,
    "channel_multipliers": [1, 2, 2, 4],
    "temporal_downsample": [False, True, True],
}


class OpenSoraVAEConfig(PretrainedConfig):  # type: ignore[misc]  # has no types
    """The repository's config.json; `vae_temporal` has sizes of the temporal part that differ."""

    model_type = "VideoAutoencoderPipeline"

    def __init__(self, vae_temporal: dict[str, Any] | None = None, **others: Any) -> None:
        super().__init__(**others)
        self.vae_temporal = _PUBLISHED_TEMPORAL | (vae_temporal or {})
        self.latent_channels: int = self.vae_temporal["in_out_channels"]


class CausalConv(nn.Module):
    """A convolution that sees no later frame; zeros around."""

    def __init__(self, channels: int, outputs: int, size: int = 3, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, outputs, size, bias=bias)
        side = size // 2
        self.padding = (side, side, side, side, size - 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, self.padding))
        return out


class ResidualBlock(nn.Module):
    """Two normed convolutions beside the input, which is projected if the channels change."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, channels)
        self.conv1 = CausalConv(channels, outputs, bias=False)
        self.norm2 = nn.GroupNorm(_GROUPS, outputs)
        self.conv2 = CausalConv(outputs, outputs, bias=False)
        self.conv3 = CausalConv(channels, outputs, 1, bias=False) if channels != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        out: Tensor = hidden + self.conv3(x)
        return out


class TemporalDecoder(nn.Module):
    """Residual blocks with a doubling of the frames after those that `downsample` marks, last to first."""

    def __init__(
        self, channels: int, filters: int, multipliers: Sequence[int], downsample: Sequence[bool], depth: int
    ) -> None:
        super().__init__()
        widths = [filters * multiplier for multiplier in multipliers]
        self.conv1 = CausalConv(channels, widths[-1])
        self.res_blocks = nn.Sequential(*(ResidualBlock(widths[-1], widths[-1]) for _ in range(depth)))
        stages, doublings, width = [], [], widths[-1]
        for place in reversed(range(len(widths))):
            inputs = [width, *[widths[place]] * (depth - 1)]
            stages.append(nn.Sequential(*(ResidualBlock(size, widths[place]) for size in inputs)))
            width = widths[place]
            if place > 0:
                doubles = downsample[place - 1]
                doublings.append(CausalConv(width, 2 * width) if doubles else nn.Identity())
        self.block_res_blocks = nn.ModuleList(reversed(stages))
        self.conv_blocks = nn.ModuleList(reversed(doublings))
        self.norm1 = nn.GroupNorm(_GROUPS, width)
        self.conv_out = CausalConv(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(x))
        # Behind the first stage nothing is doubled.
        doublings = [nn.Identity(), *self.conv_blocks]
        for stage, doubling in reversed([*zip(self.block_res_blocks, doublings, strict=True)]):
            x = stage(x)
            if isinstance(doubling, CausalConv):
                # Channels come in pairs, one for each of two frames.
                x = doubling(x).unflatten(1, (-1, 2)).movedim(2, 3).flatten(2, 3)
        out: Tensor = self.conv_out(F.silu(self.norm1(x)))
        return out


class TemporalVAE(nn.Module):
    """The half that decodes."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        inner, channels = sizes["embed_dim"], sizes["latent_embed_dim"]
        self.post_quant_conv = CausalConv(inner, channels, 1)
        self.decoder = TemporalDecoder(
            channels,
            sizes["filters"],
            sizes["channel_multipliers"],
            sizes["temporal_downsample"],
            sizes["num_res_blocks"],
        )

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """Latents (videos, channels, latent frames, height, width) to as many latents of single frames."""
        decoded: Tensor = self.decoder(self.post_quant_conv(latents))
        return decoded[:, :, -num_frames % 4 :]


class OpenSoraVAE(PreTrainedModel):  # type: ignore[misc]  # has no types
    """hpcai-tech/OpenSora-VAE-v1.2; the temporal encoder's weights are not read."""

    config_class = OpenSoraVAEConfig
    base_model_prefix = ""
    _keys_to_ignore_on_load_unexpected = (r"temporal_vae\.encoder\.", r"temporal_vae\.quant_conv\.")

    def __init__(self, config: OpenSoraVAEConfig) -> None:
        super().__init__(config)
        channels = config.latent_channels
        self.register_buffer("scale", torch.ones(1, channels, 1, 1, 1))
        self.register_buffer("shift", torch.zeros(1, channels, 1, 1, 1))
        self.spatial_vae = nn.ModuleDict({"module": AutoencoderKL(**_spatial_config(config))})
        self.temporal_vae = TemporalVAE(config.vae_temporal)
        self.post_init()

    def enable_tiling(self) -> None:
        """The frames are decoded in tiles."""
        self._spatial.enable_tiling()

    def decode(self, latents: Tensor, num_frames: int) -> Tensor:
        """The video (videos, 3, frames, height, width) in -1..1 of latents as the transformer has them."""
        latents = self.scaled(latents)
        chunks, left = [], num_frames
        for chunk in latents.split(_CHUNK_LATENTS, 2):
            chunks.append(self.temporal_vae.decode(chunk, min(CHUNK_FRAMES, left)))
            left -= CHUNK_FRAMES
        frames = torch.cat(chunks, 2).movedim(2, 1)
        pictures = [self._picture(frame) for frame in frames.flatten(0, 1).split(1)]
        video: Tensor = torch.cat(pictures).unflatten(0, frames.shape[:2])
        return video.movedim(2, 1)

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents as the transformer has them, as the temporal decoder takes them."""
        scaled: Tensor = latents * self.scale + self.shift
        return scaled

    @property
    def _spatial(self) -> Any:
        return self.spatial_vae["module"]

    def _picture(self, frame: Tensor) -> Tensor:
        picture: Tensor = self._spatial.decode(frame / _SPATIAL_SCALE, return_dict=False)[0]
        return picture


def _spatial_config(config: OpenSoraVAEConfig) -> dict[str, Any]:
    """The arguments of AutoencoderKL: a file's beside config.json if there is one."""
    path = Path(str(config._name_or_path)) / _SPATIAL_CONFIG
    if not path.is_file():
        return dict(_PUBLISHED_SPATIAL)
    entries = json.loads(path.read_text("utf-8"))
    return {name: value for name, value in entries.items() if not name.startswith("_")}
