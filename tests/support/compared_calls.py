"""Calls that are compared with those of diffusers' pipelines, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy_picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def steps_of(pipeline: Any, **call: Any) -> list[Tensor]:
    """Latents after every step of ours or of diffusers', and those that are returned."""
    steps: list[Tensor] = []

    def keep(pipe: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(tensors["latents"].clone())
        return {}

    returned: Tensor = pipeline(**call, callback_on_step_end=keep).frames
    return [*steps, returned]


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected) > 1
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert (ours - theirs).abs().max() <= 1e-4, f"step {i}"
