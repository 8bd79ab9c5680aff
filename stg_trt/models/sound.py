"""The sound of a video: the parts of a checkpoint that make it of latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SoundDecoder:
    """How a family decodes sound: `parts` of the checkpoint, and functions of a pipeline that has them.

    `decode` makes waveforms (videos, channels, samples) in float32 of packed latents (videos, tokens, width),
    at `sampling_rate` samples per second. `check` raises InvalidRequest for parts that do not fit the
    transformer's configuration.
    """

    parts: tuple[str, ...]
    decode: Callable[[Any, Tensor], Tensor]
    sampling_rate: Callable[[Any], int]
    check: Callable[[Any, Mapping[str, Any]], None]
