"""A job as the store keeps it, and as the API shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict

from ..stages import Stage
from .video_request import ResolvedRequest

Status = Literal["queued", "in_progress", "completed", "failed"]
WAITING: tuple[Status, ...] = ("queued", "in_progress")


class ErrorJson(TypedDict):
    """Why a job failed."""

    code: str
    message: str


class VideoJson(TypedDict, total=False):
    """OpenAI's Video, with fields of ours: the choices made for the request, and its cost."""

    id: str
    object: Literal["video"]
    model: str
    status: Status
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    error: ErrorJson | None
    prompt: str
    seconds: str
    size: str
    seed: int
    num_frames: int
    fps: float
    inference_time_s: float
    peak_memory_mb: float
    stages: dict[Stage, float]


@dataclass(frozen=True)
class Result:
    """The outcome of a job: bytes on disk, the MP4's SHA-256, seconds, and the GPU's peak memory in MiB.

    `stages` says where the seconds went.
    """

    bytes: int
    sha256: str
    seconds: float
    peak_memory_mb: float | None
    stages: Mapping[Stage, float]


@dataclass(frozen=True)
class Job:
    """One row of the store. `fence` counts its claims: a worker whose claim is not the last cannot write."""

    id: str
    status: Status
    request: ResolvedRequest
    has_reference: bool
    created_at: int
    completed_at: int | None
    expires_at: int | None
    error_code: str | None
    error_message: str | None
    attempts: int
    fence: int
    result: Result | None

    def json(self, progress: int = 0) -> VideoJson:
        """As the API shows it; `progress` is that of a running job, in percent."""
        request = self.request
        error: ErrorJson | None = None
        if self.error_code is not None:
            error = {"code": self.error_code, "message": self.error_message or ""}
        shown: VideoJson = {
            "id": self.id,
            "object": "video",
            "model": request.model,
            "status": self.status,
            "progress": {"in_progress": progress, "completed": 100}.get(self.status, 0),
            "created_at": self.created_at,
            "completed_at": self.completed_at,
            "expires_at": self.expires_at,
            "error": error,
            "prompt": request.prompt,
            "seconds": seconds_text(request.num_frames, request.fps),
            "size": f"{request.width}x{request.height}",
            "seed": request.seed,
            "num_frames": request.num_frames,
            "fps": request.fps,
        }
        if self.result is not None:
            shown["inference_time_s"] = round(self.result.seconds, 3)
            shown["stages"] = {stage: round(seconds, 3) for stage, seconds in self.result.stages.items()}
            if self.result.peak_memory_mb is not None:
                shown["peak_memory_mb"] = round(self.result.peak_memory_mb, 1)
        return shown


def seconds_text(frames: int, fps: float) -> str:
    """A duration as OpenAI writes it, a text: 5, or 5.04."""
    return f"{frames / fps:.2f}".rstrip("0").rstrip(".")
