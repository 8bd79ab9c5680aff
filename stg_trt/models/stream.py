"""What a model denoises side by side: a video, and its sound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RescaleSpace = Literal["prediction", "x0"]
"""What guidance rescales to the deviation of cond: its prediction, or the clean latents that this means."""


@dataclass(frozen=True)
class Stream:
    """Latents with a solver state of their own; the names of their input and output at a model's borders.

    `latents` is also their name in calls and callbacks.
    """

    latents: str
    pred: str


VIDEO = Stream("latents", "pred")
SOUND = Stream("audio_latents", "audio_pred")
