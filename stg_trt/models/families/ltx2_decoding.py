"""LTX-2's latents to frames, by its VAE, and to sound, by its audio VAE and its vocoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.families.base import vae_videos
from stg_trt.models.families.decode_timestep import add_decode_noise
from stg_trt.models.sound import SoundDecoder


def decode_frames(
    pipeline: Any, latents: Tensor, grid: tuple[int, int, int], options: Mapping[str, Any]
) -> Iterator[Tensor]:
    """Packed latents (videos, tokens, channels) of a grid (frames, rows, columns) to the VAE's videos.

    `options` are those of `add_decode_noise`. LTX2Pipeline adds the noise to normalised latents, LTXPipeline
    to those that the VAE takes.
    """
    vae = pipeline.vae
    latents = pipeline._unpack_latents(latents, *grid)
    conditions: list[Tensor] = []
    if vae.config.timestep_conditioning:
        latents, timestep = add_decode_noise(latents.to(vae.dtype), options)
        conditions.append(timestep)
    return vae_videos(vae, denormalized(pipeline, latents), *conditions)


def denormalized(pipeline: Any, latents: Tensor) -> Tensor:
    """Latents (videos, channels, frames, rows, columns) as the VAE takes them."""
    vae = pipeline.vae
    scaled: Tensor = pipeline._denormalize_latents(
        latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    )
    return scaled.to(vae.dtype)


def decode_sound(pipeline: Any, latents: Tensor) -> Tensor:
    """Packed latents (videos, tokens, channels * mel bins) to waveforms (videos, channels, samples), float32.

    One video at a time, as its frames.
    """
    vae, vocoder = pipeline.audio_vae, pipeline.vocoder
    latents = pipeline._denormalize_audio_latents(latents, vae.latents_mean, vae.latents_std)
    latents = pipeline._unpack_audio_latents(
        latents, latents.shape[1], num_mel_bins=vae.config.mel_bins // vae.mel_compression_ratio
    )
    spectra = (vae.decode(one, return_dict=False)[0] for one in latents.to(vae.dtype).split(1))
    return torch.cat([vocoder(mel.to(vocoder.dtype)) for mel in spectra]).float()


def _sampling_rate(pipeline: Any) -> int:
    return int(pipeline.vocoder.config.output_sampling_rate)


def _check(pipeline: Any, transformer: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for an audio VAE or a vocoder of another model."""
    vae, vocoder = pipeline.audio_vae, pipeline.vocoder
    spectrum = vae.config.output_channels * vae.config.mel_bins
    for part, name, got, wanted in (
        ("audio_vae", "latents per token", vae.latents_mean.numel(), transformer["audio_in_channels"]),
        ("audio_vae", "sample_rate", vae.config.sample_rate, transformer["audio_sampling_rate"]),
        ("audio_vae", "mel_hop_length", vae.config.mel_hop_length, transformer["audio_hop_length"]),
        ("vocoder", "in_channels", vocoder.config.in_channels, spectrum),
    ):
        if got != wanted:
            raise InvalidRequest(
                f"checkpoint: expected {part}/ with {name} {wanted}, got {got}: the folder mixes two models; "
                "download it again"
            )


SOUND_DECODER = SoundDecoder(("audio_vae", "vocoder"), decode_sound, _sampling_rate, _check)
