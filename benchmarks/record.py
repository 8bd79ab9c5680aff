"""What every result carries: machine, versions, commit, date, percentiles."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from stg_trt.manifest import write_atomically

_PACKAGES = ("torch", "diffusers", "onnx", "onnxscript", "onnxruntime", "tensorrt-rtx-cu13", "tensorrt-cu13")


def environment() -> dict[str, Any]:
    """Machine, versions, commit and date of a result."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, in milliseconds."""
    values = np.percentile(np.asarray(seconds) * 1e3, (50, 10, 90))
    return dict(zip(("median_ms", "p10_ms", "p90_ms"), (round(float(v), 3) for v in values), strict=True))


def save(result: dict[str, Any], path: Path) -> None:
    """Writes a result with its environment, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps({**environment(), **result}, indent=1) + "\n").encode())


def _commit() -> str:
    answer = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return answer.stdout.strip() or "unknown"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
