"""The errors users see: every message says what was expected, what was got, and the fix."""

from __future__ import annotations

import re

# torch on the CPU and on a GPU, ONNX Runtime, C++: none of them raises Python's MemoryError.
_OUT_OF_MEMORY = re.compile(r"(?i)can't allocate memory|out of memory|bad_?\s?alloc|failed to allocate")


class StgTrtError(Exception):
    """Base of all errors that are the answer to a request, not a defect of this library."""


class InvalidRequest(StgTrtError, ValueError):
    """An argument, a checkpoint or an input tensor that cannot be used."""


class EngineRejected(StgTrtError):
    """No engine in the folder fits the request, or one that fits is damaged."""


class GateMissed(StgTrtError):
    """A compiled segment failed a check of the build and was not kept."""


class OutOfDeviceMemory(StgTrtError, MemoryError):
    """The GPU has no room for engines, activations and latents of a request."""


class RankLost(StgTrtError):
    """A process that computed some of a step's passes has ended before the run."""


class BackendUnavailable(StgTrtError):
    """The backend's library is not installed or does not support this machine."""


class NotFinite(StgTrtError):
    """The latents of a run are no longer numbers, so there is no video."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the host or of a GPU, whichever library says so."""
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None
