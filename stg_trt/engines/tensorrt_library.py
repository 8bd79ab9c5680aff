"""The only place that imports TensorRT or TensorRT-RTX."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

from stg_trt.errors import BackendUnavailable
from stg_trt.system.files import LIBRARIES

PLUGIN_NAMESPACE, PLUGIN_VERSION = "stg_trt", "2"
# The library of our plugins, if it was built.
PLUGINS = LIBRARIES / "libstg_tensorrt_plugins.so"
PROGRAMS = {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}
"""Each library's own program that builds engines from graphs."""
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# The oldest version and the newest major one with every call that is made here. TensorRT imports
# RMSNormalization since 10.15, Attention since 10.14; all other calls are older.
_VERSIONS = {"tensorrt": ((10, 15), 11), "tensorrt-rtx": ((1, 7), 1)}


def load_library(backend: str) -> ModuleType:
    """The module of the backend; raises BackendUnavailable if it is not installed or not supported."""
    try:
        library = importlib.import_module(_MODULES[backend])
    except ImportError as error:
        raise BackendUnavailable(
            f"{backend}: expected the Python module {_MODULES[backend]}, got {error}: "
            f"pip install 'stg-trt[{backend}]'"
        ) from error
    _check_version(backend, str(library.__version__))
    return library


def _check_version(backend: str, version: str) -> None:
    oldest, newest_major = _VERSIONS[backend]
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < oldest or major > newest_major:
        raise BackendUnavailable(
            f"{backend}: expected version {'.'.join(map(str, oldest))} to {newest_major}.x, got {version}: "
            f"pip install --upgrade 'stg-trt[{backend}]'"
        )


def library_version(backend: str) -> str:
    """The library's full version, which its engines are tied to."""
    return str(load_library(backend).__version__)


def has_plugins() -> bool:
    """Whether the library of plugins was built."""
    return PLUGINS.exists()


def load_plugins(backend: str) -> None:
    """Registers our plugins, so that graphs and engines with their nodes can be read.

    Raises BackendUnavailable if they were not built, or would end the process.
    """
    if not has_plugins():
        raise BackendUnavailable(
            f"plugins: expected {PLUGINS}, got no such file: run make plugins TENSORRT_ROOT=<folder>"
        )
    trt = load_library(backend)
    if backend == "tensorrt-rtx":
        _check_unversioned_name(trt)
    registry = trt.get_plugin_registry()
    known = {(creator.plugin_namespace, creator.name) for creator in registry.all_creators_recursive}
    if (PLUGIN_NAMESPACE, "QKNormRope") not in known and registry.load_library(str(PLUGINS)) is None:
        raise BackendUnavailable(
            f"plugins: expected plugins for {backend} {trt.__version__}, got {PLUGINS}, which it refuses: "
            "run make plugins again with the headers of that version"
        )


def _check_unversioned_name(trt: ModuleType) -> None:
    """For plugins the parser opens libtensorrt_rtx.so, and aborts the process if it is missing."""
    libraries = importlib.import_module("tensorrt_rtx_libs")
    folder = Path(str(libraries.__path__[0]))
    searched = [Path(part) for part in os.environ.get("LD_LIBRARY_PATH", "").split(":") if part]
    if not any((place / "libtensorrt_rtx.so").exists() for place in (folder, *searched)):
        versioned = next(folder.glob("libtensorrt_rtx.so.*"))
        raise BackendUnavailable(
            f"plugins: expected libtensorrt_rtx.so, which the parser of {trt.__name__} opens for them, got "
            f"only {versioned}: run ln -s {versioned.name} {folder / 'libtensorrt_rtx.so'}"
        )
