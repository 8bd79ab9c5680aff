"""Where a sampler's memory lies and in what order its work runs: the CPU, or one CUDA stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

from stg_trt.errors import BackendUnavailable


class Graph(Protocol):
    """Captured work."""

    nodes: int

    def replay(self) -> None:
        """Runs the captured work again on the device's stream."""


class Device(Protocol):
    """One stream of work; `stream` is its handle, 0 where there are no streams."""

    torch_device: torch.device
    stream: int
    captures: bool

    def scope(self) -> AbstractContextManager[None]:
        """Inside it, torch's operations are enqueued on the stream, between the caller's before and after."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records what `work` enqueues, without running it; RuntimeError where that fails."""


class Cpu:
    """Everything runs at once, in order."""

    torch_device = torch.device("cpu")
    stream = 0
    captures = False

    def scope(self) -> AbstractContextManager[None]:
        """Nothing to enter."""
        return nullcontext()

    def capture(self, work: Callable[[], None]) -> Graph:
        """A CPU has no graphs."""
        raise RuntimeError("expected a GPU to capture on, got the CPU")


class Cuda:
    """A stream of its own on the current GPU; all graphs captured here share one memory pool."""

    captures = True

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BackendUnavailable("device: expected an NVIDIA GPU, got none: use --backend onnxruntime")
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream()
        self.stream = int(self._stream.cuda_stream)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Makes the stream torch's current one; it waits for the caller's stream, which then waits for it."""
        outer = torch.cuda.current_stream()
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            yield
        outer.wait_stream(self._stream)

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
