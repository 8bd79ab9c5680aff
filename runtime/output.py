"""What a call gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .stages import Stage


@dataclass
class VideoPipelineOutput:
    """`frames` as diffusers returns them: lists of PIL images, (videos, frames, height, width, 3) in 0..1,
    (videos, frames, 3, height, width), or latents in the layout of its pipeline.

    `audio` is None for a model without sound, else waveforms (videos, channels, samples), float32 in -1..1,
    with `audio_sampling_rate` samples per second; beside latents, the sound's packed latents (videos, tokens,
    width), and no sampling rate. `stages` says where the seconds of the call went.
    """

    frames: Any
    audio: Tensor | None = None
    audio_sampling_rate: int | None = None
    stages: Mapping[Stage, float] = field(default_factory=dict)
