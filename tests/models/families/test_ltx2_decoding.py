"""LTX-2's latents to frames and sound, as LTX2Pipeline decodes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.families.ltx2_decoding import SOUND_DECODER, decode_frames, decode_sound
from tests.support.tiny_ltx2 import (
    AUDIO_CHANNELS,
    CHANNELS,
    EMBEDS_WIDTH,
    MEL_BINS,
    REGISTERS,
    SCHEDULE,
    VERSIONS,
    connectors,
    decoding_pipeline,
    transformer,
)

SIZES = {"height": 64, "width": 96, "num_frames": 9}
GRID = (2, 2, 3)
RATES = {"2.0": 24_000, "2.3": 48_000}
# A VAE that denoises as it decodes, and adds noise inside.
NOISY = {"timestep_conditioning": True}


@cache
def pipeline(version: str, noisy: bool = False) -> LTX2Pipeline:
    """That decodes, and needs embeddings instead of prompts."""
    made = decoding_pipeline(version, **(NOISY if noisy else {}))
    torch.manual_seed(0)
    made.register_modules(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULE),
        connectors=connectors(version),
        transformer=transformer(version),
    )
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def of_diffusers(own: LTX2Pipeline, videos: int, output_type: str, seed: int, **options: Any) -> Any:
    """Two steps of LTX2Pipeline without guidance; and its generator, as they leave it."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(videos, 2 * REGISTERS, EMBEDS_WIDTH, generator=torch.Generator().manual_seed(1))
    scales = ("guidance_scale", "modality_scale", "audio_guidance_scale", "audio_modality_scale")
    made = own(
        **SIZES, **dict.fromkeys(scales, 1.0), stg_scale=0.0, audio_stg_scale=0.0, num_inference_steps=2,
        prompt_embeds=embeds, prompt_attention_mask=torch.ones(embeds.shape[:2]), output_type=output_type,
        generator=generator, **options,
    )  # fmt: skip
    return made, generator


def packed(own: LTX2Pipeline, made: Any) -> tuple[Tensor, Tensor]:
    """What the loop ended with, of the denormalised latents that diffusers returns."""
    vae, audio_vae = own.vae, own.audio_vae
    frames = own._normalize_latents(made.frames, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    sound = own._normalize_audio_latents(
        own._pack_audio_latents(made.audio), audio_vae.latents_mean, audio_vae.latents_std
    )
    return own._pack_latents(frames), sound


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_frames_and_sound_are_those_of_diffusers(version: str) -> None:
    own = pipeline(version)
    expected, _ = of_diffusers(own, 2, "np", 3)
    latents, audio_latents = packed(own, of_diffusers(own, 2, "latent", 3)[0])
    videos = torch.cat([*decode_frames(own, latents, GRID, {})])
    frames = own.video_processor.postprocess_video(videos, output_type="np")
    sound = decode_sound(own, audio_latents)
    assert np.abs(frames - expected.frames).max() <= 1e-5 and frames.std() > 1e-2
    assert sound.dtype == torch.float32 and sound.shape == expected.audio.shape
    assert (sound - expected.audio).abs().max() <= 1e-5 and sound.std(-1).min() > 1e-2
    assert (sound[0] - sound[1]).std() > 2e-3
    assert SOUND_DECODER.sampling_rate(own) == RATES[version]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decode_timestep": 0.05, "decode_noise_scale": 0.025},
        {"decode_timestep": [0.05, 0.1], "decode_noise_scale": [0.3, 0.4]},
    ],
)
@torch.no_grad()
def test_noise_of_decoding_is_that_of_diffusers(options: Mapping[str, Any]) -> None:
    own = pipeline("2.0", noisy=True)
    expected, _ = of_diffusers(own, 2, "np", 3, **options)
    made, generator = of_diffusers(own, 2, "latent", 3)
    given = {**options, "generator": generator}
    videos = torch.cat([*decode_frames(own, packed(own, made)[0], GRID, given)])
    frames = own.video_processor.postprocess_video(videos, output_type="np")
    assert np.abs(frames - expected.frames).max() <= 1e-5 and frames.std() > 1e-2


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_videos_are_decoded_one_at_a_time(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = pipeline(version)
    latents, sound = torch.randn(2, 12, CHANNELS), torch.randn(2, 9, AUDIO_CHANNELS)
    parts = []
    for part in (own.vae, own.audio_vae):
        decode = Mock(side_effect=part.decode)
        monkeypatch.setattr(part, "decode", decode)
        parts.append(decode)
    every = (latents, latents[:1], latents[1:])
    frames = [torch.cat([*decode_frames(own, some, GRID, {})]) for some in every]
    sounds = [decode_sound(own, some) for some in (sound, sound[:1], sound[1:])]
    for both, *apart in (frames, sounds):
        assert torch.equal(both, torch.cat(apart))
    assert [[len(call.args[0]) for call in part.call_args_list] for part in parts] == [[1] * 4] * 2


def test_a_vocoder_in_float32_takes_spectra_of_another_precision() -> None:
    own = decoding_pipeline("2.3")
    own.audio_vae.to(torch.bfloat16)
    with torch.no_grad():
        assert decode_sound(own, torch.randn(1, 9, AUDIO_CHANNELS)).dtype == torch.float32


@pytest.mark.parametrize(
    ("part", "entries", "message"),
    [
        ("audio_vae", {"sample_rate": 44_100}, "audio_vae/ with sample_rate 16000, got 44100"),
        ("audio_vae", {"mel_hop_length": 80}, "audio_vae/ with mel_hop_length 160, got 80"),
        ("vocoder", {"in_channels": 128}, f"vocoder/ with in_channels {2 * MEL_BINS}, got 128"),
    ],
)
def test_parts_of_two_models_are_refused(part: str, entries: dict[str, int], message: str) -> None:
    own, config = decoding_pipeline("2.0"), transformer("2.0").config
    SOUND_DECODER.check(own, config)
    getattr(own, part).register_to_config(**entries)
    with pytest.raises(InvalidRequest, match=f"checkpoint: expected {message}: the folder mixes two models"):
        SOUND_DECODER.check(own, config)


def test_a_sound_of_another_width_is_refused() -> None:
    own, config = decoding_pipeline("2.0"), transformer("2.0").config
    with pytest.raises(InvalidRequest, match="audio_vae/ with latents per token 128, got 16: the folder"):
        SOUND_DECODER.check(own, {**config, "audio_in_channels": 128})
