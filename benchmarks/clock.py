"""Time on a device: CUDA events on a GPU, perf_counter on the CPU; compared works take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from stg_trt.runtime.device import Device

WARMUPS = 3


class Event(Protocol):
    """A point in the order of a device's work."""

    def since(self, earlier: Event) -> float:
        """Seconds since an earlier event, once both were reached."""


class _HostEvent:
    def __init__(self) -> None:
        self.at = time.perf_counter()

    def since(self, earlier: Event) -> float:
        assert isinstance(earlier, _HostEvent)
        return self.at - earlier.at


class _CudaEvent:
    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def since(self, earlier: Event) -> float:
        assert isinstance(earlier, _CudaEvent)
        self.event.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1e3


def record_event(device: Device) -> Event:
    """An event after what was enqueued so far; inside the device's scope."""
    return _CudaEvent() if device.torch_device.type == "cuda" else _HostEvent()


def synchronize(device: Device) -> None:
    """Waits until the device has nothing left to do."""
    if device.torch_device.type == "cuda":
        torch.cuda.synchronize()


def _nothing() -> None:
    """For work that leaves everything as it was."""


@dataclass(frozen=True)
class Work:
    """Something to time; `reset` runs before every run, outside the time."""

    run: Callable[[], None]
    reset: Callable[[], None] = _nothing


@dataclass
class Times:
    """Seconds of every run: on the device, and until the host could go on."""

    device_s: list[float] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)


def alternate(works: Mapping[str, Work], rounds: int, device: Device) -> dict[str, Times]:
    """Times every work once a round, so that drift hits all alike; the first rounds warm up."""
    times = {name: Times() for name in works}
    synchronize(device)
    for i in range(WARMUPS + rounds):
        events = {name: _timed(work, device) for name, work in works.items()}
        synchronize(device)
        if i >= WARMUPS:
            for name, (start, end, host_s) in events.items():
                times[name].device_s.append(end.since(start))
                times[name].host_s.append(host_s)
    return times


def _timed(work: Work, device: Device) -> tuple[Event, Event, float]:
    with device.scope():
        work.reset()
        start, host_start = record_event(device), time.perf_counter()
        work.run()
        return start, record_event(device), time.perf_counter() - host_start


def median_ratio(above: Times, below: Times) -> float:
    """Median over the rounds of the ratio of two works."""
    ratios = sorted(a / b for a, b in zip(above.device_s, below.device_s, strict=True))
    return ratios[len(ratios) // 2]
