"""Peak memory of this process while something runs."""

from __future__ import annotations

import ctypes
import gc
import threading
from types import TracebackType

import psutil

_INTERVAL_S = 0.02
_MUCH_BYTES = 256 << 20

_PROCESS = psutil.Process()


def own_bytes() -> int:
    """Resident memory of this process without pages of mapped files, which the system drops to make room."""
    info = _PROCESS.memory_info()
    return int(info.rss - getattr(info, "shared", 0))


class PeakMemory:
    """Context manager; `bytes` is the most own memory that the process was seen to hold inside it."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        self.bytes = max(self.bytes, own_bytes())


def release() -> None:
    """Gives freed memory back to the system, so that the next stage does not start on top of it."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


class _Growth:
    """How far own memory has grown since it was last released."""

    def __init__(self) -> None:
        self._before_bytes = own_bytes()

    def release(self) -> None:
        if own_bytes() - self._before_bytes > _MUCH_BYTES:
            release()
            self._before_bytes = own_bytes()


_GROWTH = _Growth()


def release_growth() -> None:
    """Releases memory where much has come since the last time.

    A search for garbage visits every object of the process: most of a second, however little it finds.
    """
    _GROWTH.release()
