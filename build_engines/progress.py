"""Reports of a running build; the command line draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from stg_trt.engines.manifest import SegmentRecord
from stg_trt.models.segment import Segment


class Progress(Protocol):
    """Called from the building thread, and from the compiler's for `phase`."""

    def choose(self, choice: str) -> None:
        """Shows what `--backend auto` chose, and why."""

    def start(self, build: str, segments: tuple[Segment, ...]) -> None:
        """A build begins."""

    def calibrate(self, stage: str) -> None:
        """The calibration of FP8 enters a stage."""

    def wait(self, folder: Path) -> None:
        """Another build holds the folder; this one goes on when that ends."""

    def stage(self, segment: Segment, stage: str) -> None:
        """A segment enters a stage: reference, export, verify, compile."""

    def finish(self, segment: Segment, record: SegmentRecord, reused: bool) -> None:
        """A segment's engine is on disk."""


class Silent:
    """No reports."""

    def choose(self, choice: str) -> None:
        """Ignored."""

    def start(self, build: str, segments: tuple[Segment, ...]) -> None:
        """Ignored."""

    def calibrate(self, stage: str) -> None:
        """Ignored."""

    def wait(self, folder: Path) -> None:
        """Ignored."""

    def stage(self, segment: Segment, stage: str) -> None:
        """Ignored."""

    def finish(self, segment: Segment, record: SegmentRecord, reused: bool) -> None:
        """Ignored."""
