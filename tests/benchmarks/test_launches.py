"""Counting a profile's events: only the run's own calls, and kernels wherever they were launched from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stg_trt.benchmarks.clock import Work
from stg_trt.benchmarks.launches import Launches, count_launches, counted
from stg_trt.runtime.device import Cuda

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


def event(name: str, start: float, device: Any = CPU) -> Any:
    return SimpleNamespace(
        name=name, device_type=device, time_range=SimpleNamespace(start=start, end=start + 1)
    )


def run_range(start: float, end: float) -> Any:
    return SimpleNamespace(
        name="stg_trt run", device_type=CPU, time_range=SimpleNamespace(start=start, end=end)
    )


CALLS = [
    "aten::copy_",
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernelEx",
    "cudaGraphLaunch",
    "cudaMemcpyAsync",
    "cudaMemcpy2DAsync",
    "cudaMemsetAsync",
    "cudaStreamIsCapturing",
    "cudaEventRecord",
    "cudaMemcpy",
    "cudaStreamSynchronize",
    "cuCtxSynchronize",
    "cudaEventSynchronize",
]


def test_counts_the_calls_of_the_run() -> None:
    events = [run_range(10, 40), *(event(name, 11 + i) for i, name in enumerate(CALLS))]
    events += [event("cudaDeviceSynchronize", 41), event("cudaLaunchKernel", 2)]
    events += [event(name, 50, CUDA) for name in ("gemm", "flash_fwd", "Memcpy DtoD", "Memset (Device)")]
    events.append(event("stg_trt run", 50, CUDA))
    assert counted(events) == Launches(kernels=2, launches=7, host_syncs=4)


def test_a_blind_profiler_is_no_zero() -> None:
    assert counted([run_range(0, 10), event("cudaLaunchKernel", 1)]) == Launches(None, None, None)


@pytest.mark.gpu
def test_counts_on_a_gpu() -> None:
    device = Cuda()
    x = torch.ones(1 << 20, device="cuda")
    torch.cuda.synchronize()

    def work() -> None:
        float((x * 2 + 1).sum())

    found = count_launches(Work(work), device)
    assert found.kernels is not None and found.kernels >= 3
    assert found.launches is not None and found.launches >= 3
    assert found.host_syncs is not None and found.host_syncs >= 1
