"""Long calls into compiled code that an interrupt ends at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

Result = TypeVar("Result")

# Not every interrupt wakes a thread that waits for another.
_INTERVAL_S = 0.2


def run_interruptibly(work: Callable[[], Result], stop: Callable[[], None]) -> Result:
    """The result of `work`; an interrupt calls `stop`, waits until `work` has ended, and is raised.

    Interrupts reach the main thread only, between two of its own instructions. So it leaves `work` to a
    thread of its own; any other thread simply calls it.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name="interruptible")
    try:
        thread.start()
        _finish(thread, future)
    except BaseException:
        stop()
        _finish(thread, future)
        raise
    return future.result()


def _finish(thread: threading.Thread, future: Future[Result]) -> None:
    # Not Thread.join alone: interrupted, it takes a running thread for an ended one (CPython before 3.13).
    while thread.is_alive() and not future.done():
        wait([future], timeout=_INTERVAL_S)
    if future.done():
        thread.join()
