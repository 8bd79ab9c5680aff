"""The kernels of a step against a plain copy: verified in float64, then timed by the bytes they must move."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stg_trt.errors import GateMissed
from stg_trt.runtime.device import Device, open_device

from . import record
from .clock import Work, alternate
from .kernel_cases import KERNELS, Case
from .launches import count_launches

LTX_ELEMENTS = 128 * 5280
"""Latents of LTX-Video at 704x480x121: channels times tokens."""

_COPY = "copy"
_MAX_RELATIVE = 1e-5


@dataclass(frozen=True)
class KernelBenchmark:
    """Every kernel on every number of latent elements, beside a copy of as many bytes."""

    device: str
    elements: tuple[int, ...]
    rounds: int

    def run(self, output: Path) -> None:
        """Verifies, times, prints a table and writes the JSON, which grows with every size."""
        device = open_device(self.device)
        results = record.Record(output, "kernels", rounds=self.rounds, kernels=[])
        for elements in self.elements:
            cases = {kernel.name: kernel.make(elements, device) for kernel in KERNELS}
            for name, case in cases.items():
                if not case.error <= _MAX_RELATIVE:
                    raise GateMissed(
                        f"{name}: expected {case.implementation} within a relative {_MAX_RELATIVE} of "
                        f"float64, got {case.error:.1e}: do not trust timings of it"
                    )
            rows = [self._timed(name, case, elements, device) for name, case in cases.items()]
            results.add(kernels=[*results.result["kernels"], *rows])
        results.finish()
        _print(results.result)

    def _timed(self, name: str, case: Case, elements: int, device: Device) -> dict[str, Any]:
        times = alternate({name: case.work, _COPY: _copy(case.bytes, device)}, self.rounds, device)
        seconds, copy_s = median(times[name].device_s), median(times[_COPY].device_s)
        row: dict[str, Any] = {
            "name": name,
            "implementation": case.implementation,
            "elements": elements,
            "bytes": case.bytes,
            "relative_error": case.error,
            **record.percentiles(times[name].device_s),
            "gb_per_s": round(case.bytes / seconds / 1e9, 2),
            "copy_gb_per_s": round(case.bytes / copy_s / 1e9, 2),
            "share_of_copy": round(copy_s / seconds, 4),
        }
        if device.torch_device.type == "cuda":
            row |= count_launches(case.work, device).to_json()
        return row


def _copy(size: int, device: Device) -> Work:
    """A copy that reads half of `size` bytes and writes as many."""
    source, target = (torch.ones(size // 2, dtype=torch.uint8, device=device.torch_device) for _ in range(2))
    return Work(lambda: (target.copy_(source), None)[1])


def _print(result: dict[str, Any]) -> None:
    table = Table()
    for column in ("kernel", "implementation", "elements", "median ms", "GB/s", "of a copy"):
        table.add_column(column, justify="left" if column in ("kernel", "implementation") else "right")
    for row in result["kernels"]:
        table.add_row(
            row["name"],
            row["implementation"],
            f"{row['elements']:,}",
            f"{row['median_ms']:.3f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['share_of_copy']:.0%}",
        )
    Console().print(table)
