"""The stream that a sampler works on, and the graphs captured from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from stg_trt.system.stream import CpuStream, CudaStream, Stream


class Graph(Protocol):
    """Captured work."""

    nodes: int

    def replay(self) -> None:
        """Runs the captured work again on the device's stream."""


class Device(Stream, Protocol):
    """A stream whose work can be captured, where `captures`."""

    captures: bool

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records what `work` enqueues, without running it; RuntimeError where that fails."""


class Cpu(CpuStream):
    """The CPU, where work runs at once."""

    captures = False

    def capture(self, work: Callable[[], None]) -> Graph:
        """A CPU has no graphs."""
        raise RuntimeError("expected a GPU to capture on, got the CPU")


class Cuda(CudaStream):
    """A stream of the current GPU; all graphs captured here share one memory pool."""

    captures = True

    def __init__(self) -> None:
        super().__init__()
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], None]) -> Graph:
        """Thread-local capture: what other threads do on the GPU does not disturb it."""
        captured = torch.cuda.CUDAGraph(keep_graph=True)
        self._stream.synchronize()
        with torch.cuda.graph(
            captured, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            work()
        captured.instantiate()
        return _CudaGraph(captured, self._stream)


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        from cuda.bindings import runtime

        self._graph = graph
        self._stream = stream
        error, _, self.nodes = runtime.cudaGraphGetNodes(graph.raw_cuda_graph())
        if int(error):
            raise RuntimeError(f"cudaGraphGetNodes failed with {error}")

    def replay(self) -> None:
        with torch.cuda.stream(self._stream):
            self._graph.replay()


def open_device(name: str) -> Device:
    """The device of a backend, `cpu` or `cuda`; raises BackendUnavailable where there is none."""
    return Cuda() if name == "cuda" else Cpu()
