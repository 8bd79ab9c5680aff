"""Long calls into compiled code that an interrupt ends at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")
Job = tuple["Future[Any]", Callable[[], Any]]

# Not every interrupt wakes a thread that waits for another.
_INTERVAL_S = 0.2


class _Worker:
    """One thread for all calls of the main thread: starting one for each takes as long as a small engine."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._thread: threading.Thread | None = None
        # A forked process has no thread but the one that forked it.
        os.register_at_fork(after_in_child=self._forget)

    def put(self, future: Future[Any], work: Callable[[], Any]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="interruptible", daemon=True)
            self._thread.start()
        self._jobs.put((future, work))

    def _forget(self) -> None:
        self._jobs, self._thread = SimpleQueue(), None

    def _run(self) -> None:
        while True:
            _finish_job(*self._jobs.get())


_WORKER = _Worker()


def run_interruptibly(work: Callable[[], Result], stop: Callable[[], None]) -> Result:
    """What `work` returns; an interrupt calls `stop`, waits until `work` has ended, and is raised.

    Interrupts reach the main thread only, between two of its own instructions. So it leaves `work` to
    another thread; any other thread simply calls it.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    future: Future[Result] = Future()
    try:
        _WORKER.put(future, work)
        _wait_for(future)
    except BaseException:
        stop()
        # Not begun, it never begins.
        future.cancel()
        _wait_for(future)
        raise
    return future.result()


def _finish_job(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def _wait_for(future: Future[Any]) -> None:
    while not future.done():
        wait([future], timeout=_INTERVAL_S)
