"""The NVIDIA GPU of this machine, as torch and the driver describe it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuIdentity:
    """The GPU that engines for `this-gpu` are tied to: their kernels were chosen by timing them on it.

    `sm` is its compute capability, as targets name it (sm_90); `driver` is the driver's major version.
    """

    name: str
    sm: str
    multiprocessors: int
    driver: str

    def __str__(self) -> str:
        return f"{self.name} ({self.sm}, {self.multiprocessors} multiprocessors, driver {self.driver})"


@dataclass(frozen=True)
class Gpu:
    """`sm` is its compute capability, as targets name it: sm_90."""

    name: str
    sm: str
    memory_bytes: int
    multiprocessors: int
    driver: str

    @property
    def identity(self) -> GpuIdentity:
        """The facts that decide whether engines of another GPU run on it."""
        return GpuIdentity(self.name, self.sm, self.multiprocessors, self.driver.split(".")[0])


@dataclass(frozen=True)
class Machine:
    """The devices that engines can run on: the CPU and, if there is one, a GPU."""

    gpu: Gpu | None = None


def find_gpu() -> Gpu | None:
    """The GPU that torch would use; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Gpu(
        properties.name,
        f"sm_{properties.major}{properties.minor}",
        properties.total_memory,
        properties.multi_processor_count,
        _driver(),
    )


def this_machine() -> Machine:
    """The devices of this machine."""
    return Machine(find_gpu())


def _driver() -> str:
    """The driver's version; `unknown` without its own tool."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else "unknown"
