"""The memory that this process may use: the machine's, or that of the container it runs in."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
# The files of cgroup v2, then of v1: the limit, and what is used of it.
_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def total_bytes() -> int:
    """All of it, without swap."""
    limit = _container()
    total = int(psutil.virtual_memory().total)
    return total if limit is None else min(total, limit[0])


def available_bytes() -> int:
    """What is free now, with swap."""
    free = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    limit = _container()
    return free if limit is None else min(free, max(0, limit[0] - limit[1]))


def _container() -> tuple[int, int] | None:
    """Limit and use of this process's container; None without one."""
    for limit, used in _FILES:
        try:
            return int((_CGROUP / limit).read_text()), int((_CGROUP / used).read_text())
        except (OSError, ValueError):  # No such version, or "max": no limit.
            continue
    return None
