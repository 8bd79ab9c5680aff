"""Opens TensorRT's builder, runtime and engines, whose calls return nothing on failure and log the reason."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stg_trt.errors import BackendUnavailable, EngineRejected, OutOfDeviceMemory, StgTrtError
from stg_trt.system.units import GIB

# CUDA's error 35. It also means that there is no driver at all.
_OLD_DRIVER = re.compile(r"(?i)error:? ?35\b|driver version is insufficient")
_OUT_OF_MEMORY = re.compile(r"(?i)out ?of ?memory|could not be allocated|insufficient memory")


def error_log(trt: Any, listen: Callable[[str], None] = lambda message: None) -> Any:
    """A logger with all `errors` so far, causes first; `listen` gets every other message."""

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            else:
                listen(message)

    return ErrorLog()


def open_builder(trt: Any, backend: str, log: Any) -> Any:
    """A builder; raises BackendUnavailable with the reason if the GPU or its driver refuses."""
    return _opened(trt.Builder, trt, backend, log)


def open_runtime(trt: Any, backend: str, log: Any) -> Any:
    """A runtime; raises BackendUnavailable with the reason if the GPU or its driver refuses."""
    return _opened(trt.Runtime, trt, backend, log)


def read_engine(trt: Any, backend: str, runtime: Any, path: Path, log: Any) -> Any:
    """The engine of a file, which is mapped: plans of several GB are not copied to memory first.

    Raises OutOfDeviceMemory, BackendUnavailable or EngineRejected with TensorRT's own reason.
    """
    known = len(log.errors)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        engine = runtime.deserialize_cuda_engine(plan)
        size = len(plan)
    if engine is None:
        raise _why_not_loaded(trt, backend, path, size, log.errors[known:])
    return engine


def lacks_memory(errors: Sequence[str]) -> bool:
    """Whether TensorRT gave up for lack of GPU memory."""
    return any(map(_OUT_OF_MEMORY.search, errors))


def _opened(kind: Any, trt: Any, backend: str, log: Any) -> Any:
    try:
        return kind(log)
    except TypeError as error:
        # The bindings turn a null pointer into "factory function returned nullptr".
        raise _unavailable(trt, backend, log.errors or [str(error)]) from error


def _why_not_loaded(trt: Any, backend: str, path: Path, size: int, errors: Sequence[str]) -> StgTrtError:
    if any(map(_OLD_DRIVER.search, errors)):
        return _unavailable(trt, backend, errors)
    if lacks_memory(errors):
        return OutOfDeviceMemory(
            f"{path}: expected {size / GIB:.2f} GiB of free GPU memory for its weights, got {errors[0]}: "
            "free some, or use the segmented layout, which holds the weights once"
        )
    reason = errors[0] if errors else "no reason"
    return EngineRejected(
        f"{path}: expected an engine that {backend} {trt.__version__} can load on this GPU, got {reason}: "
        "build the engines again here"
    )


def _unavailable(trt: Any, backend: str, errors: Sequence[str]) -> BackendUnavailable:
    if any(map(_OLD_DRIVER.search, errors)):
        return BackendUnavailable(
            f"{backend} {trt.__version__}: expected an NVIDIA driver that is new enough for its CUDA "
            "version, got an older one or none: update the driver"
        )
    return BackendUnavailable(
        f"{backend} {trt.__version__}: expected a GPU that it can use, got {errors[0]}: "
        "check the GPU and its driver with nvidia-smi"
    )
