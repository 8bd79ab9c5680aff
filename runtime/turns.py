"""A pipeline serves one call at a time: its static memory and its scheduler belong to the call that runs."""

from __future__ import annotations

import threading
from types import TracebackType

from stg_trt.errors import InvalidRequest


class Turns:
    """Context manager of a call; other threads wait, and a call from inside a call is refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None

    def __enter__(self) -> None:
        if self._thread == threading.get_ident():
            raise InvalidRequest(
                "VideoPipeline: expected one call at a time, got a call from inside a callback: call it when "
                "this one has ended, or open a second pipeline"
            )
        self._lock.acquire()
        self._thread = threading.get_ident()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread = None
        self._lock.release()
