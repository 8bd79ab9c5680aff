"""What a job's error becomes: its code and message for clients, and whether the GPU is still of use."""

from __future__ import annotations

import errno
import gc
import logging
from dataclasses import dataclass

import torch

from stg_trt.errors import InvalidRequest, NotFinite, RankLost, StgTrtError, is_out_of_memory

from .refusal import Refusal, from_library

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """Why a job has no video."""

    code: str
    message: str


def failure_of(error: Exception, id: str) -> Failure:
    """The code and message of a job's error, which is logged; memory that its frames held is freed.

    A defect of ours is not explained to clients.
    """
    code, message = _explained(error)
    _log.warning("%s: %s", id, message, exc_info=error if code == "internal_error" else None)
    _free_memory(error)
    return Failure(code, message)


def leaves_no_gpu(error: Exception) -> bool:
    """CUDA says the same of every later call, such as after an illegal memory access."""
    return "CUDA error: " in str(error) and not is_out_of_memory(error)


def _explained(error: Exception) -> tuple[str, str]:
    if is_out_of_memory(error):
        said = str(error).splitlines()[0] if isinstance(error, StgTrtError) else "the machine has no more"
        return "out_of_memory", f"out of memory: {said}; fewer frames or a smaller size need less"
    if isinstance(error, NotFinite):
        return "not_finite", str(error)
    if isinstance(error, RankLost):
        return "gpu_lost", str(error)
    if isinstance(error, Refusal):
        return error.code, error.message
    if isinstance(error, StgTrtError):
        # The video file cannot be written: its path is no client's business.
        if isinstance(error, InvalidRequest) and str(error).startswith("output: "):
            return "disk_full", "The server cannot write the video: its disk is full or not writable."
        return "invalid_request", from_library(error).message
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "disk_full", "The server has no free disk space for the video."
    return "internal_error", "The server could not make this video because of an error of its own."


def _free_memory(error: Exception) -> None:
    """Frames of the traceback hold tensors; torch keeps what they leave for itself."""
    if is_out_of_memory(error):
        error.__traceback__ = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
