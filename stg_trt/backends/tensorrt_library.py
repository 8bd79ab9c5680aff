"""The only place that imports TensorRT or TensorRT-RTX."""

from __future__ import annotations

import importlib
from types import ModuleType

from stg_trt.errors import BackendUnavailable

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def load_library(backend: str) -> ModuleType:
    """The module of the backend; raises BackendUnavailable where it is not installed."""
    try:
        return importlib.import_module(_MODULES[backend])
    except ImportError as error:
        raise BackendUnavailable(
            f"{backend}: expected the Python module {_MODULES[backend]}, got {error}: "
            f"pip install 'stg-trt[{backend}]'"
        ) from error


def library_version(backend: str) -> str:
    """The library's full version, which its engines are tied to."""
    return str(load_library(backend).__version__)
