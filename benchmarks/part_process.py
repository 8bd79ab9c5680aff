"""One part of a run: a process with a limit, whose lines are shown and kept as they come."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from .gpu_plan import ROOT, Part

_GRACE_S = 5
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")
_SUMMARY = re.compile(r"\d+ \w+.* in [\d.:]+s")


class Log:
    """The output of all parts, on the terminal and in a file, line by line."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("w", encoding="utf-8", buffering=1)

    def write(self, line: str) -> None:
        """Shows and keeps a line at once."""
        print(line, flush=True)
        self._file.write(f"{line}\n")

    def close(self) -> None:
        """Nothing is written afterwards."""
        self._file.close()


class PartProcess:
    """A part at work in a session of its own; `lines` is what it has printed so far."""

    def __init__(self, part: Part, environment: Mapping[str, str], log: Log) -> None:
        self.part = part
        self.lines: list[str] = []
        self._start = time.monotonic()
        self._process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env={**environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self._reader.start()

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._start

    def finish(self, limit_s: float) -> str:
        """Waits until the part is done or has run for its seconds, ends it, and says how it ended."""
        try:
            status = self._process.wait(max(0.0, limit_s - self.seconds))
            ended = "done" if status == 0 else f"failed with exit status {status}"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {limit_s:.0f} s"
        self.stop()
        if ended == "done" and self.part.tests and not self.count_tests().get("passed"):
            return "failed: no test passed"
        return ended

    def stop(self) -> None:
        """Ends the part with everything that it started: first as Ctrl-C would, then at once."""
        for signum in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, signum)
                self._process.wait(_GRACE_S)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._reader.join(_GRACE_S)

    def count_tests(self) -> dict[str, int]:
        """Outcomes of pytest's last line, such as passed: 586; empty if it did not get that far."""
        summary = next((line for line in reversed(self.lines) if _SUMMARY.search(line)), "")
        return {outcome: int(count) for count, outcome in _COUNT.findall(summary)} if self.part.tests else {}

    def _read(self, log: Log) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))
            log.write(f"{self.part.name} | {self.lines[-1]}")
