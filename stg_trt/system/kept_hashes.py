"""SHA-256 of large files, kept between runs by (path, size, mtime), so that start-up reads no gigabytes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from stg_trt.system.files import file_sha256, write_atomically

# File systems count time in steps of up to two seconds: a file changed in the same step looks the same.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True)
class _Entry:
    """What a file looked like when it was hashed; `path` tells apart two paths of one name in the cache."""

    path: str
    size: int
    mtime_ns: int


def kept_sha256(path: Path, *, whole: bool = False) -> str:
    """SHA-256 of a file: the kept one if the file looks the same as when it was hashed, unless `whole`.

    A hash is kept in the user's cache folder, unless the file has changed within the last two seconds or the
    folder cannot be written.
    """
    resolved = path.resolve()
    before = _entry(resolved)
    kept = cache_folder() / f"{hashlib.sha256(str(resolved).encode()).hexdigest()[:32]}.json"
    if not whole and (known := _read(kept, before)) is not None:
        return known
    settled = time.time_ns() - before.mtime_ns > _SETTLED_NS
    found = file_sha256(resolved)
    if settled and _entry(resolved) == before:
        _keep(kept, before, found)
    return found


def cache_folder() -> Path:
    """Where hashes are kept: in STG_TRT_CACHE, else in stg_trt below XDG_CACHE_HOME or ~/.cache."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("STG_TRT_CACHE") or Path(user) / "stg_trt") / "hashes"


def _entry(path: Path) -> _Entry:
    stat = path.stat()
    return _Entry(str(path), stat.st_size, stat.st_mtime_ns)


def _read(kept: Path, entry: _Entry) -> str | None:
    """The hash, if it is of a file that looked so; a damaged record counts as none."""
    try:
        record = json.loads(kept.read_text("utf-8"))
        found = record.pop("sha256")
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None
    return found if record == asdict(entry) and isinstance(found, str) else None


def _keep(kept: Path, entry: _Entry, found: str) -> None:
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, json.dumps({**asdict(entry), "sha256": found}).encode())
