"""`make bench-gpu`: everything that only a GPU can tell, most valuable first, within a number of minutes.

Each part is a process with a limit. gpu.json says from the start how each part stands; the result of one that
has ended, or was cut off, is in it at once, and until then in a file beside it. So a run leaves at most six
files: gpu.json, gpu.log, gpu.md with its plot, and the results of the two parts that may be at work.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stg_trt.errors import BackendUnavailable, GateMissed, InvalidRequest

from . import record
from .gpu_plan import IN_PLACE, KERNEL_LIBRARY, REHEARSAL, Part, Scale, Stage, choose_parts, plan_stages
from .part_process import Log, PartProcess
from .report import write_report

REHEARSED = "A rehearsal on a CPU with small models: no number of it says anything about a GPU."
_SMALLEST_S = 15
_KEPT_LINES = 40


class GpuRun:
    """Runs stages in order until the time is up; `name` is that of its files."""

    def __init__(self, output: Path, name: str, minutes: float, scale: Scale) -> None:
        if minutes <= 0:
            raise InvalidRequest(f"minutes: expected more than 0, got {minutes}: use 9")
        self._deadline = time.monotonic() + 60 * minutes
        self._scale = scale
        rehearsal = REHEARSED if scale is REHEARSAL else None
        facts = {"device": scale.device, "rehearsal": rehearsal, "minutes": minutes}
        self._results = record.Record(output / f"{name}.json", "gpu", **facts, parts=[])
        self._log = Log(output / f"{name}.log")
        if rehearsal is not None:
            self._log.write(rehearsal)

    def run(self, stages: Sequence[Stage]) -> None:
        """Runs and records them; raises GateMissed in the end unless all were done."""
        try:
            self._results.add(parts=[_row(part, "not started") for stage in stages for part in stage])
            for stage in stages:
                left_s = self._deadline - time.monotonic()
                if left_s >= min(_SMALLEST_S, *(part.limit_s for part in stage)):
                    self._run(stage, left_s)
                    continue
                for part in stage:
                    self._set(_row(part, "not started: no time left"))
            self._results.finish()
            for row in self._results.result["parts"]:
                self._log.write(f"== {row['name']}: {row['ended']}, {row['seconds']:.0f} s")
        finally:
            self._log.close()
        ends = {row["name"]: row["ended"] for row in self._results.result["parts"]}
        missed = [f"{name} {ended}" for name, ended in ends.items() if ended != "done"]
        if missed:
            raise GateMissed(
                f"gpu: expected every part done, got {'; '.join(missed)}: the JSON has their last lines; "
                "what they measured is kept"
            )

    def _run(self, stage: Stage, left_s: float) -> None:
        """Runs the parts of a stage at the same time; the one with the shortest limit is waited for first."""
        running: list[PartProcess] = []
        try:
            for part in sorted(stage, key=lambda part: part.limit_s):
                if part.output is not None:
                    # Of an earlier run that was killed.
                    part.output.unlink(missing_ok=True)
                self._set(_row(part, "running"))
                self._log.write(f"== {part.name}")
                running.append(PartProcess(part, _environment(self._scale), self._log))
            while running:
                process = running[0]
                self._keep(process, process.finish(min(process.part.limit_s, left_s)))
                running.pop(0)
        finally:
            for process in running:
                process.stop()
                self._keep(process, "interrupted")

    def _keep(self, process: PartProcess, ended: str) -> None:
        """Moves what a part measured into the run's own result."""
        part = process.part
        row = _row(part, ended) | {
            "seconds": round(process.seconds, 1),
            "last_lines": process.lines[-_KEPT_LINES:],
        }
        if tests := process.count_tests():
            row["tests"] = tests
        if part.output is not None and part.output.exists():
            row["result"] = json.loads(part.output.read_text("utf-8"))
        self._set(row)
        if part.output is not None:
            part.output.unlink(missing_ok=True)
        self._log.write(f"== {part.name}: {ended}, {process.seconds:.0f} s")

    def _set(self, row: dict[str, Any]) -> None:
        rows = self._results.result["parts"]
        self._results.add(parts=[row if old["name"] == row["name"] else old for old in rows])


def _row(part: Part, ended: str) -> dict[str, Any]:
    return {"name": part.name, "command": [*part.command], "ended": ended, "seconds": 0.0}


def _environment(scale: Scale) -> dict[str, str]:
    """That of the parts: they import the package in place, not from the folder that they run in."""
    paths = [str(IN_PLACE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    if scale is REHEARSAL:
        return environment | {"CUDA_VISIBLE_DEVICES": ""}
    if KERNEL_LIBRARY.exists():
        environment["STG_TRT_TEST_KERNELS"] = str(KERNEL_LIBRARY)
    return environment


def bench_gpu(output: Path, minutes: float, scale: Scale, backend: str | None, only: str | None) -> None:
    """All parts, or those that `only` names, with engines that are thrown away afterwards; then the report.

    Raises InvalidRequest without the tree of `make in-place`, in which the parts run.
    """
    if not (IN_PLACE / "stg_trt").is_dir():
        raise InvalidRequest(f"gpu: expected the package in {IN_PLACE}, got none: run make bench-gpu")
    # A part has a session of its own: it must not outlive this process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    name = "rehearsal" if scale is REHEARSAL else "gpu"
    if only is not None:
        # The results of all parts stay as they are.
        name += "".join(f"-{word.strip().replace(' ', '-')}" for word in only.split(","))
    with tempfile.TemporaryDirectory() as engines:
        stages = plan_stages(scale, output.resolve(), Path(engines), backend or scale.backend)
        chosen = choose_parts(stages, only)
        run = GpuRun(output, name, minutes, scale)
        try:
            run.run(chosen)
        finally:
            _report(output / name)


def _report(path: Path) -> None:
    """Writes tables and a plot beside the JSON; says so if it cannot plot."""
    result = path.with_name(f"{path.name}.json")
    if not result.exists():
        return
    try:
        write_report([result], path.with_name(f"{path.name}.md"), None)
    except BackendUnavailable as error:
        print(error)
