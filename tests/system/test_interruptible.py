"""Calls that an interrupt ends: their results, their errors, and their remains."""

from __future__ import annotations

import _thread
import os
import signal
import threading
from collections.abc import Callable

import pytest

from stg_trt.system.interruptible import run_interruptibly


def send_signal() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def never_called() -> None:
    raise AssertionError("stopped without an interrupt")


def test_a_result_comes_back_from_a_thread_of_its_own() -> None:
    assert run_interruptibly(threading.get_ident, never_called) != threading.get_ident()


def test_an_error_comes_back() -> None:
    with pytest.raises(ZeroDivisionError):
        run_interruptibly(lambda: 1 / 0, never_called)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("interrupt", [send_signal, _thread.interrupt_main])
def test_an_interrupt_stops_the_call_and_waits_for_it(interrupt: Callable[[], None]) -> None:
    stopped, ended = threading.Event(), threading.Event()

    def work() -> None:
        interrupt()
        assert stopped.wait(60)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(work, stopped.set)
    assert ended.is_set()
    assert run_interruptibly(lambda: 1, never_called) == 1


@pytest.mark.usefixtures("interrupts")
def test_an_error_of_the_stopped_call_does_not_hide_the_interrupt() -> None:
    stopped = threading.Event()

    def work() -> None:
        send_signal()
        assert stopped.wait(60)
        raise RuntimeError("terminated")

    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(work, stopped.set)


def test_other_threads_which_no_interrupt_reaches_call_it_themselves() -> None:
    seen: list[int] = []

    def other() -> None:
        seen.extend([threading.get_ident(), run_interruptibly(threading.get_ident, never_called)])

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen[0] == seen[1]
