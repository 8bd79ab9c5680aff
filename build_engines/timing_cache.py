"""How long TensorRT's kernels took on this GPU, kept from build to build so that none is timed twice."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from stg_trt.system.files import write_atomically

_log = logging.getLogger(__name__)


def load_timings(config: Any, path: Path) -> None:
    """Gives the builder the timings of earlier builds; those of another GPU or version count as none."""
    try:
        kept = path.read_bytes() if path.exists() else b""
    except OSError as error:
        _warn(path, "read", error)
        kept = b""
    _log.info("%s: %d bytes of timings", path, len(kept))
    cache = config.create_timing_cache(kept)
    if cache is None or not config.set_timing_cache(cache, False):
        _log.info("%s: of another GPU or library, all kernels are timed again", path)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def save_timings(config: Any, path: Path) -> None:
    """Writes all timings whole or not at all; a folder that cannot be written costs time, not the build."""
    try:
        write_atomically(path, bytes(config.get_timing_cache().serialize()))
    except OSError as error:
        _warn(path, "kept", error)


def _warn(path: Path, verb: str, error: OSError) -> None:
    _log.info("%s: cannot be %s: %s", path, verb, error.strerror)
    warnings.warn(
        f"{path}: timings of kernels cannot be {verb} ({error.strerror}), the next build takes them again",
        stacklevel=3,
    )
