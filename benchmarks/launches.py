"""Counts of one run on a GPU: kernels, launches, and waits of the host."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stg_trt.runtime.device import Device

from .clock import Work, synchronize

_RUN = "stg_trt run"
_COPY = re.compile(r"mem(cpy|set)", re.IGNORECASE)
_LAUNCH = re.compile(r"cu(da)?(LaunchKernel|LaunchCooperativeKernel|GraphLaunch|Mem(cpy|set)\w*Async)")
# A plain cudaMemcpy waits for the device; its Async form does not.
_WAIT = re.compile(r"cu(da)?(\w+Synchronize|Memcpy(?!\w*Async)\w*)\b")


@dataclass(frozen=True)
class Launches:
    """Counts of one run: kernels on the GPU, calls that enqueue work, calls that wait for it.

    All None if the profiler saw no kernel, for example without permission to read the GPU's counters.
    """

    kernels: int | None = None
    launches: int | None = None
    host_syncs: int | None = None

    def to_json(self) -> dict[str, int | None]:
        """For a result."""
        return asdict(self)


def count_launches(work: Work, device: Device) -> Launches:
    """One run under torch's profiler; on a GPU only."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with device.scope():
        work.reset()
        synchronize(device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            with record_function(_RUN):
                work.run()
            synchronize(device)
    return counted(profiler.events() or ())


def counted(events: Iterable[Any]) -> Launches:
    """Counts over a profile's events; driver calls outside the run's own range are the profiler's."""
    listed = list(events)
    on_host = [event for event in listed if event.device_type == torch.autograd.DeviceType.CPU]
    (run,) = (event.time_range for event in on_host if event.name == _RUN)
    calls = [
        event.name
        for event in on_host
        if run.start <= event.time_range.start and event.time_range.end <= run.end
    ]
    kernels = [
        event.name
        for event in listed
        if event.device_type == torch.autograd.DeviceType.CUDA
        and event.name != _RUN
        and not _COPY.match(event.name)
    ]
    if not kernels:
        return Launches()
    return Launches(
        kernels=len(kernels),
        launches=sum(_LAUNCH.match(name) is not None for name in calls),
        host_syncs=sum(_WAIT.match(name) is not None for name in calls),
    )
