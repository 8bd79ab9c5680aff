"""Progress of a build: a live line per segment on a terminal, plain lines elsewhere; then a table."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from stg_trt.engines.manifest import Manifest, SegmentRecord
from stg_trt.engines.reused import REUSED
from stg_trt.models.segment import Segment
from stg_trt.system.units import GIB


class BuildDisplay:
    """A line per segment with its stage and time; when it is done, its peak memory."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TextColumn("{task.fields[stage]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, object] = {}
        self._refreshed = 0.0

    def __enter__(self) -> BuildDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def choose(self, choice: str) -> None:
        """Says what it chose, and why."""
        self._console.print(choice)

    def start(self, build: str, segments: tuple[Segment, ...]) -> None:
        """Lists the segments."""
        self._console.print(f"{build}: {', '.join(segment.name for segment in segments)}")

    def calibrate(self, stage: str) -> None:
        """Says what it measures."""
        self._console.print(f"calibrating fp8: {stage}")

    def wait(self, folder: Path) -> None:
        """Says why nothing happens."""
        self._console.print(f"{folder.name}: another build is at work here, waiting for it to end")

    def stage(self, segment: Segment, stage: str) -> None:
        """Shows what the segment is at."""
        if segment.name not in self._tasks:
            self._tasks[segment.name] = self._progress.add_task(segment.name, total=None, stage=stage)
        # The compiler reports thousands of phases; a terminal is read a few times a second.
        elif time.monotonic() - self._refreshed > 0.1 or ":" not in stage:
            self._progress.update(self._tasks[segment.name], stage=stage)  # type: ignore[arg-type]
            self._refreshed = time.monotonic()

    def finish(self, segment: Segment, record: SegmentRecord, reused: bool) -> None:
        """Marks the segment done."""
        if reused:
            self._console.print(f"{segment.name}: already built")
            return
        stage = f"done, peak {record.peak_bytes / GIB:.1f} GiB"
        taken = "".join(f", {REUSED[name]}" for name in record.reused)
        self._progress.update(self._tasks[segment.name], stage=stage + taken, total=1, completed=1)  # type: ignore[arg-type]
        if not self._console.is_terminal:
            self._console.print(f"{segment.name}: {stage}, {sum(record.seconds.values()):.1f} s{taken}")


def print_summary(folder: Path, manifest: Manifest) -> None:
    """One row per segment of a finished build."""
    print(folder)
    table = Table()
    for column in ("segment", "seconds", "peak GiB", "MB", "attentions", "relative L2", "farthest"):
        table.add_column(column, justify="left" if column in ("segment", "farthest") else "right")
    for record in manifest.segments:
        fused = "?" if record.fused_attentions is None else record.fused_attentions
        farthest = max(record.verification, key=lambda found: found.relative_l2, default=None)
        table.add_row(
            record.segment.name,
            f"{sum(record.seconds.values()):.1f}",
            f"{record.peak_bytes / GIB:.1f}",
            f"{record.engine_bytes / 1e6:.1f}",
            f"{fused}/{record.attentions}",
            "not verified" if farthest is None else f"{farthest.relative_l2:.1e}",
            "" if farthest is None else farthest.piece or "whole segment",
        )
    Console().print(table)
