"""The shift of a flow schedule that grows with the number of tokens, as diffusers' pipelines calculate it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TokenShift:
    """The shift at two numbers of tokens, unless the scheduler's configuration has others."""

    base_image_seq_len: int
    max_image_seq_len: int
    base_shift: float
    max_shift: float

    def of(self, scheduler: Any, tokens: int) -> dict[str, float]:
        """`mu` for the scheduler's `set_timesteps`; nothing if it takes none."""
        if "mu" not in inspect.signature(scheduler.set_timesteps).parameters:
            return {}
        few, many, low, high = (scheduler.config.get(name, usual) for name, usual in vars(self).items())
        slope = (high - low) / (many - few)
        return {"mu": tokens * slope + (low - slope * few)}


def set_even_sigmas(scheduler: Any, steps: int, shift: dict[str, float]) -> None:
    """Sigmas from 1 to 1/steps, shifted; a scheduler that takes none of them makes its own."""
    takes = inspect.signature(scheduler.set_timesteps).parameters.keys()
    if {"sigmas", "mu"} <= takes:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **shift)
    else:
        scheduler.set_timesteps(steps)
