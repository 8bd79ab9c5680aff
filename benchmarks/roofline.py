"""The rate of a large matrix product, measured in the same run: the floor of everything made of them."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from stg_trt.runtime.device import Device

from .clock import Work, alternate

_SIZES = {"cuda": 8192, "cpu": 1024}
_ROUNDS = 10


@dataclass(frozen=True)
class Floor:
    """FLOP/s of a square matrix product in the engines' dtype."""

    dtype: str
    size: int
    flops_per_s: float

    def ms(self, flops: int) -> float:
        """Milliseconds that so many operations would take at this rate."""
        return flops / self.flops_per_s * 1e3

    def to_json(self) -> dict[str, Any]:
        """For a result."""
        return {"dtype": self.dtype, "size": self.size, "tflops": round(self.flops_per_s / 1e12, 4)}


def measure_floor(device: Device, dtype: str) -> Floor:
    """Multiplies two random matrices again and again."""
    size = _SIZES[device.torch_device.type]
    options = {"device": device.torch_device, "dtype": getattr(torch, dtype)}
    left, right, out = (torch.randn(size, size, **options) for _ in range(3))
    work = Work(lambda: (torch.mm(left, right, out=out), None)[1])
    seconds = alternate({"product": work}, _ROUNDS, device)["product"].device_s
    return Floor(dtype, size, 2 * size**3 / median(seconds))
