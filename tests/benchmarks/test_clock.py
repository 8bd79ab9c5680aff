"""Rounds alternate, warm-ups are not counted, and what is reset is not timed."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from stg_trt.benchmarks.clock import WARMUPS, Times, Work, alternate, median_ratio
from stg_trt.benchmarks.memory import memory_in_use, working_bytes
from stg_trt.runtime.device import Cpu

MIB = 1 << 20


def test_works_take_turns() -> None:
    order: list[str] = []
    works = {name: Work(partial(order.append, name)) for name in "AB"}
    times = alternate(works, 4, Cpu())
    assert order == ["A", "B"] * (WARMUPS + 4)
    assert all(len(t.device_s) == len(t.host_s) == 4 for t in times.values())


def test_a_reset_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("stg_trt.benchmarks.clock.time.perf_counter", lambda: now[0])
    times = alternate({"work": Work(lambda: pass_time(1), lambda: pass_time(5))}, 2, Cpu())
    assert times["work"].device_s == times["work"].host_s == [1, 1]


def test_the_ratio_is_taken_in_pairs() -> None:
    """A drift that doubles everything leaves it as it is."""
    assert median_ratio(Times([1.0, 2.0, 4.0]), Times([2.0, 4.0, 8.0])) == 0.5


def test_memory_of_a_run() -> None:
    before = memory_in_use(Cpu())
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    assert memory_in_use(Cpu()) - before > 32 * MIB
    del held

    def allocate() -> None:
        held = torch.ones(64 * MIB, dtype=torch.uint8)
        time.sleep(0.2)
        del held

    assert 32 * MIB < working_bytes(Work(allocate), Cpu()) < 128 * MIB
