"""A result file: machine, versions, commit and date, checked for before anything is measured.

A benchmark adds its own entries to three that all results have: `complete`,
`trusted`, and `doubts`, which are the reasons if it is not.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stg_trt.errors import GateMissed, InvalidRequest
from stg_trt.system.files import write_atomically
from stg_trt.system.gpu import find_gpu
from stg_trt.system.versions import installed_version

_PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "tensorrt-rtx-cu13",
    "tensorrt-cu13",
)


class Record:
    """One result as it grows: every `add` rewrites the file, whole or not at all."""

    def __init__(self, path: Path, benchmark: str, **facts: Any) -> None:
        """Makes the folder; raises InvalidRequest if the file could not be written."""
        check_output(path)
        self._path = path
        self.result: dict[str, Any] = {
            **environment(),
            "benchmark": benchmark,
            **facts,
            "complete": False,
            "trusted": True,
            "doubts": [],
        }

    def add(self, **parts: Any) -> None:
        """Keeps what was measured, should the rest be cut off."""
        self.result |= parts
        write_atomically(self._path, (json.dumps(self.result, indent=1) + "\n").encode())

    def distrust(self, doubts: Iterable[str]) -> None:
        """Adds reasons why this must not be published, if there are any; measuring goes on."""
        known = [*self.result["doubts"], *doubts]
        if known:
            self.add(trusted=False, doubts=known)

    def finish(self) -> None:
        """Marks the result as complete; raises GateMissed if it is not trusted."""
        self.add(complete=True)
        if self.result["doubts"]:
            raise GateMissed(
                f"{'; '.join(self.result['doubts'])}: what was measured is kept as untrusted, and the report "
                "does not publish it"
            )


def check_output(path: Path) -> None:
    """Makes the folder of a result; raises InvalidRequest if there can be none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(
            f"output: expected a folder that can be made, got {path.parent} ({error.strerror}): "
            "choose another"
        ) from error
    if not os.access(path.parent, os.W_OK):
        raise InvalidRequest(
            f"output: expected a folder that can be written, got {path.parent}: choose another"
        )
    if path.is_dir():
        raise InvalidRequest(f"output: expected a file's name, got the folder {path}: name a .json in it")


def environment() -> dict[str, Any]:
    """Machine, versions, commit and date of a result."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := installed_version(name))},
    }


def percentiles(seconds: Sequence[float], prefix: str = "") -> dict[str, float]:
    """Median, 10th and 90th percentile, in milliseconds."""
    values = np.percentile(np.asarray(seconds) * 1e3, (50, 10, 90))
    names = (f"{prefix}{name}_ms" for name in ("median", "p10", "p90"))
    return dict(zip(names, (round(float(value), 4) for value in values), strict=True))


def _commit() -> str:
    """The checkout's commit, or STG_TRT_COMMIT if a copy without its history is measured."""
    folder = Path(__file__).parent
    head = _answer(["git", "rev-parse", "--short=12", "HEAD"], folder)
    if not head:
        return os.environ.get("STG_TRT_COMMIT", "unknown")
    return f"{head}-changed" if _answer(["git", "status", "--porcelain", "-uno"], folder) else head


def _gpu() -> dict[str, Any] | None:
    """The GPU that torch would use, its driver, and torch's CUDA."""
    gpu = find_gpu()
    return None if gpu is None else {**asdict(gpu), "cuda": torch.version.cuda}


def _answer(command: list[str], folder: Path) -> str:
    """A program's output; empty if it is not installed or fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    except FileNotFoundError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
