"""A strict stand-in for a GPU's stream and captures, on the host's memory.

It enforces what CUDA and torch's allocator would punish later or silently: no host reads during capture, and
nothing allocated or captured after a failed capture until its pool was ended. A capture can be made to fail,
and a graph to lack some of the captured work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stg_trt.runtime.operations import Operation, Operations, TorchOperations

STREAM = 77


class RuleBroken(Exception):
    """Something that is undefined behaviour, or ends the process, on a GPU."""


class SimulatedGpu:
    """State that a device and its libraries share; the calls in `failing` fail."""

    def __init__(self) -> None:
        self.failing: set[str] = set()
        self.graph: SimulatedGraph | None = None
        self.capturing = False


class SimulatedGraph:
    """Replays by running the captured work again, with a GPU's freedom to sync taken away."""

    def __init__(self, device: SimulatedCuda, work: Callable[[], None]) -> None:
        self.device = device
        self.work = work
        self.nodes: int | None = 0
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.device.replaying = True
        self.work()
        self.device.replaying = False


class SimulatedCuda:
    """A device whose memory is the host's.

    `lost` names work that graphs lack, `timeline` is what a profiler would show. While `recording`, torch's
    allocator believes in a capture.
    """

    torch_device = torch.device("cpu")
    stream = STREAM

    def __init__(self, gpu: SimulatedGpu) -> None:
        self.gpu = gpu
        self.captures = True
        self.operations: Operations = TorchOperations()
        self.graphs: list[SimulatedGraph] = []
        self.attempts = 0
        self.recording = False
        self.replaying = False
        self.lost: set[str] = set()
        self.timeline: list[str] = []

    @contextmanager
    def scope(self) -> Iterator[None]:
        yield

    def capture(self, work: Callable[[], None]) -> SimulatedGraph:
        self.empty_cache()  # As torch does before every capture.
        self.attempts += 1
        graph = SimulatedGraph(self, work)
        before = len(self.timeline)
        self.gpu.graph, self.gpu.capturing, self.recording = graph, True, True
        try:
            with _NoHostReads():
                work()
        finally:
            self.gpu.graph, self.gpu.capturing = None, False
        if "capture" in self.gpu.failing:
            # As on a GPU: what is wrong with a capture is said where it ends.
            raise RuntimeError("CUDA error: capture was made to fail\nFor debugging, read more.")
        self.recording = False
        graph.nodes = len(self.timeline) - before
        self.graphs.append(graph)
        return graph

    def stop_capturing(self) -> None:
        self.recording = False
        self.captures = False

    def named(self, name: str, operation: Operation) -> Operation:
        def enqueue(stream: int) -> None:
            self.timeline.append(name)
            if not (self.replaying and name in self.lost):
                operation(stream)

        return enqueue

    def empty_cache(self) -> None:
        """torch.cuda.empty_cache()."""
        if self.recording:
            raise RuleBroken("captures_underway.empty() INTERNAL ASSERT FAILED")


class _NoHostReads(TorchDispatchMode):
    """Reading a value on the host would synchronise, which a capture forbids."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuleBroken(f"{func} reads a value on the host during capture")
        return func(*args, **(kwargs or {}))
