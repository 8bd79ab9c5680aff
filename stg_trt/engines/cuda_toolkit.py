"""Finds the headers of the CUDA toolkit and the driver library: compiling for a GPU needs both."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

_HEADERS = ("cuda.h", "cuda_runtime_api.h")
_USUAL_PLACE = Path("/usr/local/cuda")


def cuda_toolkit() -> Path | None:
    """The folder with the toolkit's include/: torch's CUDA_HOME, the usual place, torch's own wheels.

    torch takes the folder above the first nvcc on the PATH, which may be a script that lies elsewhere.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    places = [Path(CUDA_HOME)] if CUDA_HOME else []
    for place in (*places, _USUAL_PLACE, *_wheels()):
        if all((place / "include" / header).is_file() for header in _HEADERS):
            return place
    return None


@contextmanager
def cuda_build() -> Iterator[None]:
    """Inside it, torch's compilations find the toolkit and link with the driver that this process uses.

    A container may have it as libcuda.so.1 alone, where no linker searches; -lcuda asks for libcuda.so.
    """
    from torch.utils import cpp_extension

    toolkit, driver = cuda_toolkit(), loaded_library("libcuda.so")
    home, searched = cpp_extension.CUDA_HOME, os.environ.get("LIBRARY_PATH")
    with tempfile.TemporaryDirectory() as folder:
        try:
            cpp_extension.CUDA_HOME = None if toolkit is None else str(toolkit)
            if driver is not None:
                (Path(folder) / "libcuda.so").symlink_to(driver)
                # Last, so that a toolkit's own stub stays the first choice.
                os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, (searched, folder)))
            yield
        finally:
            cpp_extension.CUDA_HOME = home
            os.environ.pop("LIBRARY_PATH", None)
            if searched is not None:
                os.environ["LIBRARY_PATH"] = searched


def loaded_library(name: str) -> Path | None:
    """The file of a shared library in this process whose name starts with `name`; None if there is none."""
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        return None
    found = re.search(rf"\s(/\S*/{re.escape(name)}\S*)$", mapped.read_text(), re.MULTILINE)
    return None if found is None else Path(found[1])


def _wheels() -> list[Path]:
    """The header folders of the wheels that torch for CUDA depends on."""
    spec, version = find_spec("nvidia"), torch.version.cuda
    if spec is None or version is None:
        return []
    return [Path(place) / f"cu{version.split('.')[0]}" for place in spec.submodule_search_locations or ()]
