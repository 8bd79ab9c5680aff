"""The device that a sampler works on: its stream, its operations, and the graphs captured from them.

What a profiler's timeline shows on a GPU are NVTX ranges named after the work: `fan_out`, the segments
(`front`, `block_19`, `back`), `copy_rows`, `guided_step`. In steps that run without a graph every range spans
the launches of its work, and Nsight Systems projects it onto the kernels. A captured step is launched as a
whole: the same ranges lie over its capture, where nothing runs yet, and each replay is one range, such as
`replay uncond+cond+skip`, in which `nsys profile --cuda-graph-trace=node` shows the kernels one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch

from stg_trt.system.stream import CpuStream, CudaStream, Stream

from .kernels.operations import KernelOperations
from .kernels.shared_library import load_kernels
from .operations import CpuOperations, Operation, Operations, TorchOperations


class Graph(Protocol):
    """Captured work; `nodes` are None if they cannot be counted."""

    nodes: int | None

    def replay(self) -> None:
        """Runs the captured work again on the device's stream."""


class Device(Stream, Protocol):
    """A stream and the operations around the engines on it; if it `captures`, work can become graphs."""

    captures: bool
    operations: Operations

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records what `work` enqueues, without running it; RuntimeError if that fails.

        After a failure nothing must be allocated before `stop_capturing`.
        """

    def stop_capturing(self) -> None:
        """Puts right what a failed capture leaves behind; the process captures nothing more."""

    def named(self, name: str, operation: Operation) -> Operation:
        """The operation under a name that profilers show."""


class Cpu(CpuStream):
    """The CPU, where work runs at once."""

    captures = False

    def __init__(self) -> None:
        self.operations: Operations = CpuOperations()

    def capture(self, work: Callable[[], None]) -> Graph:
        """A CPU has no graphs."""
        raise RuntimeError("expected a GPU to capture on, got the CPU")

    def stop_capturing(self) -> None:
        """It never began."""

    def named(self, name: str, operation: Operation) -> Operation:
        """The operation itself."""
        return operation


class Cuda(CudaStream):
    """A stream of the current GPU; all graphs captured here share one memory pool."""

    captures = True

    def __init__(self) -> None:
        super().__init__()
        kernels = load_kernels()
        self.operations: Operations = TorchOperations() if kernels is None else KernelOperations(kernels)
        self._count_nodes = node_counter()
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
        return _CudaGraph(captured, self._stream, self._count_nodes(captured))

    def stop_capturing(self) -> None:
        """Ends the pool of a capture that failed, takes a new one, and gives the generator a clean state.

        Up to torch 2.11 the allocator goes on recording into the pool, and the next empty_cache() or capture
        ends in an internal assertion (github.com/pytorch/pytorch/pull/180395). Its twin for pinned memory
        cannot be ended from Python, hence no further capture on any device of the process.
        """
        Cuda.captures = False
        index, pool = self.torch_device.index, self._pool
        self._pool = torch.cuda.graph_pool_handle()
        # A generator that believes to be captured refuses to draw.
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
        try:
            torch._C._cuda_endAllocateToPool(index, pool)
        except RuntimeError:
            return  # Not recording: this torch has ended it by itself.
        torch._C._cuda_releasePool(index, pool)

    def named(self, name: str, operation: Operation) -> Operation:
        """The operation in an NVTX range."""

        def enqueue(stream: int) -> None:
            with torch.cuda.nvtx.range(name):
                operation(stream)

        return enqueue


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, nodes: int | None) -> None:
        self.nodes = nodes
        self._graph = graph
        self._stream = stream

    def replay(self) -> None:
        with torch.cuda.stream(self._stream):
            self._graph.replay()


@cache
def node_counter() -> Callable[[torch.cuda.CUDAGraph], int | None]:
    """Counts the nodes of a graph; without cuda-bindings, which is said once, they stay unknown."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        warnings.warn(
            f"device: expected the package cuda-bindings, got {error}: the nodes of captured graphs are not "
            "counted: pip install cuda-bindings",
            stacklevel=2,
        )
        return lambda graph: None

    def count(graph: torch.cuda.CUDAGraph) -> int:
        error, _, nodes = runtime.cudaGraphGetNodes(graph.raw_cuda_graph())
        if int(error):
            raise RuntimeError(f"cudaGraphGetNodes failed with {error}")
        return int(nodes)

    return count


def open_device(name: str) -> Device:
    """The device of a backend, `cpu` or `cuda`; raises BackendUnavailable without such a device."""
    return Cuda() if name == "cuda" else Cpu()
