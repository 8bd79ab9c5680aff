"""What an operator sets, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from stg_trt.errors import InvalidRequest


@dataclass(frozen=True)
class ServerSettings:
    """Limits and keys of a server.

    `data` is the folder of its jobs and videos. Without `api_keys` every request is let in. `max_queue` jobs
    wait at most; a picture has at most `max_upload_bytes`. Results are removed `expire_s` seconds after they
    were made. While they take `quota_bytes` or more, new jobs are refused. On SIGTERM the running job has
    `drain_s` seconds to finish. Raises InvalidRequest for numbers that make no sense, by the options' names.
    """

    data: Path
    api_keys: tuple[str, ...] = ()
    max_queue: int = 64
    max_upload_bytes: int = 32 << 20
    expire_s: float = 24 * 3600.0
    quota_bytes: int = 20 << 30
    drain_s: float = 600.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_queue", self.max_queue, 1),
            ("max_upload_mib", self.max_upload_bytes, 1),
            ("expire_hours", self.expire_s, 1),
            ("quota_gib", self.quota_bytes, 1),
            ("drain_seconds", self.drain_s, 0),
        ):
            if not least <= value < math.inf:
                bound = "a number of 0 or more" if least == 0 else "a number above 0"
                raise InvalidRequest(f"{name}: expected {bound}, got {value:g}: correct it")
        if any(not key.strip() for key in self.api_keys):
            raise InvalidRequest("api_key: expected a key, got an empty text: leave it out to have none")
