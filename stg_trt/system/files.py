"""Files that are written whole or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import stg_trt

# Kernels and plugins, as `make kernels` and `make plugins` install them.
LIBRARIES = Path(stg_trt.__file__).resolve().parent / "lib"


def write_atomically(path: Path, data: bytes) -> None:
    """Temporary file, fsync, rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
