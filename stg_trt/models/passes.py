"""The passes of a guided step: the model's predictions without the prompt, with it, and perturbed."""

from __future__ import annotations

from typing import Literal

Pass = Literal["uncond", "cond", "skip"]
PASSES: tuple[Pass, ...] = ("uncond", "cond", "skip")
"""The order of their rows in every buffer; each pass has one row per video."""
