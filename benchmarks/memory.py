"""Memory in use: the GPU's, or without one the resident memory of this process."""

from __future__ import annotations

import psutil
import torch

from stg_trt.build_engines.memory import PeakMemory, own_bytes, release
from stg_trt.runtime.device import Device

from .clock import Work, synchronize


def memory_in_use(device: Device) -> int:
    """Bytes taken now, with what was freed given back; engines that torch knows nothing of are in it."""
    release()
    if device.torch_device.type != "cuda":
        return int(psutil.Process().memory_info().rss)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def working_bytes(work: Work, device: Device) -> int:
    """Bytes that one run takes on top of those in use before it; 0 if all were allocated beforehand."""
    with device.scope():
        work.reset()
        synchronize(device)
        if device.torch_device.type != "cuda":
            before = own_bytes()
            with PeakMemory() as peak:
                work.run()
            taken: int = max(0, peak.bytes - before)
            return taken
        before = int(torch.cuda.memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        work.run()
        synchronize(device)
        return int(torch.cuda.max_memory_allocated()) - before
