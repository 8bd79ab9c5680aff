"""The kernels of a step against a plain copy: verified in float64, then timed by the bytes they must move.

Then the optimisations of the engines: what each should gain beside what it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stg_trt.runtime.device import Device, open_device

from . import record
from .clock import Work, alternate
from .expected_gains import SIZES, measure_gains
from .kernel_cases import KERNELS, Case
from .launches import count_launches
from .roofline import format_share, share_of_ceiling
from .verify import finite_or_none

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
            results.distrust(
                f"{name}: expected {case.implementation} of {elements} elements within a relative "
                f"{_MAX_RELATIVE} of float64, got {case.error:.1e}"
                for name, case in cases.items()
                if not case.error <= _MAX_RELATIVE
            )
            rows = [self._timed(name, case, elements, device) for name, case in cases.items()]
            results.add(kernels=[*results.result["kernels"], *rows])
        results.add(optimisations=measure_gains(device, _copied_per_s(device, self.rounds), self.rounds))
        _print(results.result)
        results.finish()

    def _timed(self, name: str, case: Case, elements: int, device: Device) -> dict[str, Any]:
        times = alternate({name: case.work, _COPY: _copy(case.bytes, device)}, self.rounds, device)
        seconds, copy_s = median(times[name].device_s), median(times[_COPY].device_s)
        row: dict[str, Any] = {
            "name": name,
            "implementation": case.implementation,
            "elements": elements,
            "bytes": case.bytes,
            "relative_error": finite_or_none(case.error),
            **record.percentiles(times[name].device_s),
            "gb_per_s": round(case.bytes / seconds / 1e9, 2),
            "copy_gb_per_s": round(case.bytes / copy_s / 1e9, 2),
            "share_of_copy": share_of_ceiling(copy_s / seconds),
        }
        if device.torch_device.type == "cuda":
            row |= count_launches(case.work, device).to_json()
        return row


def _copied_per_s(device: Device, rounds: int) -> float:
    """Bytes that a copy of the hidden states of a step reads and writes a second: more than a cache holds."""
    size = 2 * SIZES[device.torch_device.type].hidden_bytes
    seconds = alternate({_COPY: _copy(size, device)}, rounds, device)[_COPY].device_s
    return size / median(seconds)


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
            format_share(row["share_of_copy"]),
        )
    Console().print(table)
