"""The metrics of a server, in Prometheus' text format."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..stages import Stage

_STEP_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_STAGE_S = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_VIDEO_S = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


@dataclass(frozen=True)
class Levels:
    """Values of the gauges, measured when they are asked for."""

    queued: int
    running: int
    result_bytes: int
    ready: bool


class Metrics:
    """Of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._finished = Counter(
            "stg_trt_videos",
            "Videos that ended, by what became of them.",
            ("model", "outcome"),
            registry=registry,
        )
        self._steps = Histogram(
            "stg_trt_step_seconds", "Denoising steps.", ("model",), buckets=_STEP_S, registry=registry
        )
        self._videos = Histogram(
            "stg_trt_video_seconds", "Completed videos, from text to file.", ("model",), buckets=_VIDEO_S,
            registry=registry,
        )  # fmt: skip
        self._stages = Histogram(
            "stg_trt_stage_seconds", "Stages of completed videos.", ("model", "stage"), buckets=_STAGE_S,
            registry=registry,
        )  # fmt: skip
        self._answers = Counter(
            "stg_trt_http_requests",
            "Requests by route and status.",
            ("method", "route", "status"),
            registry=registry,
        )
        self._queued = Gauge("stg_trt_videos_queued", "Videos that wait.", registry=registry)
        self._running = Gauge("stg_trt_videos_running", "Videos being made.", registry=registry)
        self._bytes = Gauge("stg_trt_result_bytes", "Bytes of all results on disk.", registry=registry)
        self._ready = Gauge("stg_trt_ready", "1 after the warm-up videos.", registry=registry)
        self._lock = threading.Lock()
        self._last_step_s: float | None = None
        self._last_video_s: float | None = None

    @property
    def poll_after_ms(self) -> int:
        """When a client should look again: two steps, of 0.1 to 5 seconds together; 1 s before the first."""
        with self._lock:
            seconds = 0.5 if self._last_step_s is None else self._last_step_s
        return int(1000 * min(max(2 * seconds, 0.1), 5))

    @property
    def retry_after_s(self) -> int:
        """When a place in a full queue is likely to be free: one video, of 1 to 60 seconds."""
        with self._lock:
            seconds = 10 if self._last_video_s is None else self._last_video_s
        return int(min(max(seconds + 0.5, 1), 60))

    def count_step(self, model: str, seconds: float) -> None:
        """A denoising step has ended."""
        self._steps.labels(model).observe(seconds)
        with self._lock:
            self._last_step_s = seconds

    def count_stages(self, model: str, stages: Mapping[Stage, float]) -> None:
        """A video has been made and written."""
        for stage, seconds in stages.items():
            self._stages.labels(model, stage).observe(seconds)

    def count_video(self, model: str, outcome: str, seconds: float) -> None:
        """A job has ended: completed, cancelled, or the code of its error."""
        self._finished.labels(model, outcome).inc()
        if outcome == "completed":
            self._videos.labels(model).observe(seconds)
            with self._lock:
                self._last_video_s = seconds

    def count_answer(self, method: str, route: str, status: int) -> None:
        """A request has been answered; `route` is a pattern of paths, of which there are few."""
        self._answers.labels(method, route, str(status)).inc()

    def text(self, levels: Levels) -> bytes:
        """All of it, in the text format."""
        self._queued.set(levels.queued)
        self._running.set(levels.running)
        self._bytes.set(levels.result_bytes)
        self._ready.set(levels.ready)
        return generate_latest(self._registry)
