"""`make bench-gpu`: everything that only a GPU can tell, most valuable first, within a number of minutes.

Every part is a process of its own with a limit of its own; what it has measured is in its JSON when it is
cut off, and gpu.json says how each part ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stg_trt.errors import GateMissed, InvalidRequest

from . import record

ROOT = Path(__file__).parents[1]
_LIBRARY = ROOT / "stg_trt" / "lib" / "libstg_kernels.so"
_SMALLEST_S = 15
_GRACE_S = 5
_KEPT_LINES = 40
_BUILD = "kernel build"


@dataclass(frozen=True)
class Part:
    """One command and the seconds that it may take."""

    name: str
    command: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True)
class Model:
    """A published configuration at one size, perturbed as its family's defaults say."""

    name: str
    width: int
    height: int
    num_frames: int
    stg_mode: str
    stg_block: int

    def __str__(self) -> str:
        return f"{self.name}-{self.width}x{self.height}x{self.num_frames}"

    @property
    def options(self) -> tuple[str, ...]:
        """What `bench` calls them."""
        size = (f"--height={self.height}", f"--width={self.width}", f"--num-frames={self.num_frames}")
        perturbed = (f"--stg-mode={self.stg_mode}", f"--stg-blocks={self.stg_block}")
        return (f"--checkpoint={self.name}", *size, *perturbed)


LTX = Model("ltx-video-2b", 704, 480, 121, "stg-a", 19)
LARGE_LTX = Model("ltx-video-2b", 1216, 704, 121, "stg-a", 19)
COGVIDEOX = Model("cogvideox-2b", 720, 480, 49, "stg-r", 11)
WAN = Model("wan2.1-t2v-1.3b", 832, 480, 81, "stg-r", 8)


def planned_parts(output: Path, engines: Path, backend: str) -> list[Part]:
    """Tests, the step, its peers, the kernels, the foreign engine, whole calls; then larger models."""
    tests = (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", str(ROOT / "tests"))

    def measure(workload: str, model: Model, limit_s: float, *options: str) -> Part:
        places = (f"--engines={engines}", f"--output={output / f'{workload}-{model}.json'}")
        arguments = (*model.options, f"--backend={backend}", *places, *options)
        return Part(f"{workload} {model}", _bench(workload, *arguments), limit_s)

    kernels = ("--device=cuda", f"--output={output / 'kernels.json'}")
    larger = [
        part
        for model in (LARGE_LTX, COGVIDEOX, WAN)
        for part in (
            measure("step", model, 240, "--layouts=segmented", "--rounds=5"),
            measure("peers", model, 240, "--rounds=5"),
        )
    ]
    return [
        Part("gpu tests", tests, 180),
        *_kernel_build(),
        measure("step", LTX, 300),
        measure("peers", LTX, 240),
        Part("kernels", _bench("kernels", *kernels), 60),
        Part("foreign engine", _bench("foreign-engine", f"--output={output / 'foreign-engine.json'}"), 90),
        measure("sample", LTX, 90, "--rounds=3"),
        *larger,
    ]


def chosen_parts(parts: Sequence[Part], only: str | None) -> list[Part]:
    """Those whose names have one of the comma-separated words of `only` in them; None is all of them.

    The build of the kernels, where it is planned, is always one of them: the others run with them. Raises
    InvalidRequest for a word that no name has.
    """
    if only is None:
        return [*parts]
    words = [word.strip() for word in only.split(",")]
    unknown = [word for word in words if not word or not any(word in part.name for part in parts)]
    if unknown:
        names = ", ".join(part.name for part in parts)
        raise InvalidRequest(
            f"only: expected words of the parts {names}, got {unknown[0]!r}: correct it or leave it out"
        )
    return [part for part in parts if part.name == _BUILD or any(word in part.name for word in words)]


def _bench(*arguments: str) -> tuple[str, ...]:
    """A command of this program, under the name that it was started with."""
    return (sys.executable, "-m", str(__package__), *arguments)


def _kernel_build() -> list[Part]:
    """The CUDA kernels, for this GPU alone, where they are not there and there is a compiler."""
    if _LIBRARY.exists() or not (shutil.which("cmake") and shutil.which("nvcc")):
        return []
    folder = "build/kernels-native"
    configure = f"cmake -S . -B {folder} -DCMAKE_CUDA_ARCHITECTURES=native -DBUILD_TESTING=OFF"
    steps = (configure, f"cmake --build {folder} --parallel", f"cmake --install {folder} --prefix .")
    return [Part(_BUILD, ("sh", "-c", " && ".join(steps)), 90)]


class GpuRun:
    """Runs parts in order until the time is up."""

    def __init__(self, output: Path, minutes: float) -> None:
        if minutes <= 0:
            raise InvalidRequest(f"minutes: expected more than 0, got {minutes}: use 9")
        self._deadline = time.monotonic() + 60 * minutes
        self._results = record.Record(output / "gpu.json", "gpu", minutes=minutes, parts=[])

    def run(self, parts: Sequence[Part]) -> None:
        """Runs and records them; raises GateMissed in the end unless all were done."""
        for part in parts:
            left_s = self._deadline - time.monotonic()
            if left_s < min(_SMALLEST_S, part.limit_s):
                self._add(part, "not started: no time left", 0.0, [])
                continue
            print(f"== {part.name}", flush=True)
            start = time.monotonic()
            ended, lines = run_part(part, min(part.limit_s, left_s))
            seconds = time.monotonic() - start
            print(f"== {part.name}: {ended}, {seconds:.0f} s", flush=True)
            self._add(part, ended, seconds, lines)
        self._results.finish()
        ends = {row["name"]: row["ended"] for row in self._results.result["parts"]}
        missed = [f"{name} {ended}" for name, ended in ends.items() if ended != "done"]
        if missed:
            raise GateMissed(
                f"gpu: expected every part done, got {'; '.join(missed)}: gpu.json has their last lines; "
                "what they measured is kept"
            )

    def _add(self, part: Part, ended: str, seconds: float, lines: list[str]) -> None:
        row: dict[str, Any] = {
            "name": part.name,
            "command": [*part.command],
            "ended": ended,
            "seconds": round(seconds, 1),
            "last_lines": lines[-_KEPT_LINES:],
        }
        self._results.add(parts=[*self._results.result["parts"], row])


def run_part(part: Part, limit_s: float) -> tuple[str, list[str]]:
    """How the part ended, and what it printed, which is shown as it comes."""
    process = subprocess.Popen(
        part.command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: list[str] = []
    reader = threading.Thread(target=_show, args=(process, lines), daemon=True)
    reader.start()
    try:
        status = process.wait(limit_s)
        ended = "done" if status == 0 else f"failed with exit status {status}"
    except subprocess.TimeoutExpired:
        ended = f"cut off after {limit_s:.0f} s"
    finally:
        _stop(process)
    reader.join(_GRACE_S)
    return ended, lines


def _show(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        print(line, end="", flush=True)


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends the part with everything that it started: first as Ctrl-C would, then at once."""
    for signum in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
            process.wait(_GRACE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def bench_gpu(output: Path, minutes: float, backend: str, only: str | None = None) -> None:
    """All parts, or those that `only` names, with engines that are thrown away afterwards."""
    # A part has a session of its own: it must not outlive this process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as engines:
        parts = chosen_parts(planned_parts(output.resolve(), Path(engines), backend), only)
        GpuRun(output, minutes).run(parts)
