"""The roofline of a step: the fastest matrix product of this run, and which share of it a model reaches.

One library at one shape is no ceiling: MKL on another maker's CPU multiplies at a third of what the engines
reach. So several of both are tried, on the same device, in the same dtype, with as many threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from stg_trt.runtime.device import Device, open_device

from .clock import record_event, synchronize
from .matmuls import LIBRARIES, Multiply, Prepare, Shape

ABOVE_CEILING = "above the measured ceiling: calibration too low"
# Two measurements of the same rate differ by less.
_MOST_SHARE = 1.05
# A cube, the rows of a video times a layer's weights, and a larger cube.
_SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": ((1024, 1024, 1024), (4096, 512, 2048), (2048, 2048, 2048)),
    "cuda": ((4096, 4096, 4096), (16384, 2048, 8192), (8192, 8192, 8192)),
}
# A product that takes as long keeps every core busy: a larger one is no faster.
_LONG_S = 0.02
_MOST_RUNS, _BUDGET_S = 10, 0.2


@dataclass(frozen=True)
class PeakMatmul:
    """The fastest matrix product: its rate, and what reached it."""

    dtype: str
    library: str
    shape: Shape
    threads: int
    flops_per_s: float

    def ms(self, flops: int) -> float:
        """Milliseconds that this many operations would take at this rate."""
        return flops / self.flops_per_s * 1e3

    def mfu(self, flops: int, ms: float) -> float | None:
        """Model FLOPs utilisation: the share of this rate that this many operations in that time reach.

        None if it is above 1 by more than two measurements of one rate differ.
        """
        return share_of_ceiling(self.ms(flops) / ms)

    def to_json(self) -> dict[str, Any]:
        """For a result."""
        facts = asdict(self)
        return {**facts, "tflops": round(facts.pop("flops_per_s") / 1e12, 4)}


def share_of_ceiling(share: float) -> float | None:
    """The share, or None if its ceiling was measured too low."""
    return round(share, 4) if share <= _MOST_SHARE else None


def format_share(share: float | None) -> str:
    """A share as it is printed; one that is None says why."""
    return ABOVE_CEILING if share is None else f"{share:.0%}"


def measure_peak_matmul(device: Device, dtype: str) -> PeakMatmul:
    """The best of all libraries and shapes, measured once in this process for the device and dtype."""
    return _measured(device.torch_device.type, dtype, torch.get_num_threads())


@cache
def _measured(kind: str, dtype: str, threads: int) -> PeakMatmul:
    device = open_device(kind)
    peaks = [
        PeakMatmul(dtype, library, shape, threads, rate)
        for library, prepare in LIBRARIES[kind].items()
        for shape, rate in _rates(prepare, getattr(torch, dtype), device)
    ]
    return max(peaks, key=lambda peak: peak.flops_per_s)


def _rates(prepare: Prepare, dtype: torch.dtype, device: Device) -> Iterator[tuple[Shape, float]]:
    """FLOP/s of one library's fastest run at each shape; none if it lacks the dtype."""
    for m, k, n in _SHAPES[device.torch_device.type]:
        multiply = prepare((m, k, n), dtype, device)
        if multiply is None:
            return
        fastest = min(_seconds(multiply, device))
        yield (m, k, n), 2 * m * k * n / fastest
        if fastest > _LONG_S:
            return


def _seconds(multiply: Multiply, device: Device) -> Iterator[float]:
    """Seconds of some runs after a first one; fewer if they are long."""
    with device.scope():
        multiply()
        spent = 0.0
        for _ in range(_MOST_RUNS):
            synchronize(device)
            start = record_event(device)
            multiply()
            end = record_event(device)
            synchronize(device)
            yield (seconds := end.since(start))
            spent += seconds
            if spent > _BUDGET_S:
                return
