"""Seeded random weights of a model's shapes, for builds and benchmarks without a checkpoint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def random_weights(like: Mapping[str, Tensor], part: str = "") -> dict[str, Tensor]:
    """Fan-in scaled normal matrices, ones for norms: timed and compiled like trained weights, never zeros.

    Each tensor has a generator of its own, so that all cores can draw at once and the values stay the same.
    Another `part` of a checkpoint with the same names has other values.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        drawn = threads.map(lambda item: _random_weight(part, *item), like.items())
        return dict(zip(like, drawn, strict=True))


def _random_weight(part: str, name: str, like: Tensor) -> Tensor:
    import torch

    seed = int.from_bytes(hashlib.sha256(f"{part}{name}".encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    scale = like.shape[-1] ** -0.5 if like.ndim > 1 else 0.02
    weight = torch.randn(like.shape, generator=generator).mul_(scale)
    if like.ndim == 1 and "norm" in name and name.endswith("weight"):
        weight += 1
    return weight
