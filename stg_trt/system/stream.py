"""Where engines run and in what order: the CPU, or one CUDA stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

from stg_trt.errors import BackendUnavailable


class Stream(Protocol):
    """One stream of work; `stream` is its handle, 0 if there are no streams."""

    torch_device: torch.device
    stream: int

    def scope(self) -> AbstractContextManager[None]:
        """Inside it, torch's operations are enqueued on the stream, in order with those outside it."""


class CpuStream:
    """Everything runs at once, in order."""

    torch_device = torch.device("cpu")
    stream = 0

    def scope(self) -> AbstractContextManager[None]:
        """Nothing to enter."""
        return nullcontext()


class CudaStream:
    """A stream of its own on the current GPU."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BackendUnavailable("device: expected an NVIDIA GPU, got none: use --backend onnxruntime")
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream()
        self.stream = int(self._stream.cuda_stream)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Makes the stream torch's current one; it and the caller's stream wait for each other, on the GPU.

        So latents that a caller reads between two steps are whole, and are read before they are overwritten.
        """
        outside = torch.cuda.current_stream()
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)


def open_stream(name: str) -> Stream:
    """A new stream on a backend's device, `cpu` or `cuda`; raises BackendUnavailable without that device."""
    return CudaStream() if name == "cuda" else CpuStream()
