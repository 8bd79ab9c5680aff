"""The operator's settings, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from stg_trt.errors import InvalidRequest
from stg_trt.system.units import GIB, MIB

# Below every limit that is of use, so that none of them is zero bytes or seconds.
_LEAST = 1e-9


@dataclass(frozen=True)
class ServerSettings:
    """Limits and keys of a server, under the names of the command's options.

    `data` is the folder of its jobs and videos. Without `api_key` every request is let in. `max_queue` jobs
    wait at most; a picture has at most `max_upload_mib`. Results are removed `expire_hours` after they were
    made. While they take `quota_gib` or more, new jobs are refused. On SIGTERM the running job has
    `drain_seconds` to finish. Raises InvalidRequest for numbers that make no sense.
    """

    data: Path
    api_key: tuple[str, ...] = ()
    max_queue: int = 64
    max_upload_mib: float = 32
    expire_hours: float = 24
    quota_gib: float = 20
    drain_seconds: float = 600

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_upload_mib", "expire_hours", "quota_gib", "drain_seconds"):
            value, may_be_zero = getattr(self, name), name == "drain_seconds"
            if not (0 if may_be_zero else _LEAST) <= value < math.inf:
                bound = "a number of 0 or more" if may_be_zero else "a number above 0"
                raise InvalidRequest(f"{name}: expected {bound}, got {value:g}: correct it")
        if any(not key.strip() for key in self.api_key):
            raise InvalidRequest("api_key: expected a key, got an empty text: leave it out to have none")

    @property
    def max_upload_bytes(self) -> int:
        """Of a picture."""
        return math.ceil(self.max_upload_mib * MIB)

    @property
    def expire_s(self) -> float:
        """From a result to its end."""
        return self.expire_hours * 3600

    @property
    def quota_bytes(self) -> int:
        """Of all results."""
        return math.ceil(self.quota_gib * GIB)
