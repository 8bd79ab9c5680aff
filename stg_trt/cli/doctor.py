"""`stg-trt doctor`: what this machine has, which backends work and why the others do not."""

from __future__ import annotations

import platform
import warnings
from typing import TYPE_CHECKING

from stg_trt.system.units import GIB
from stg_trt.system.versions import installed_version

if TYPE_CHECKING:
    from stg_trt.system.gpu import Gpu

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "tensorrt-rtx-cu13",
    "tensorrt-cu13",
    "polygraphy",
)


def doctor() -> None:
    """Show versions, the GPU, and which backends work here."""
    from rich.console import Console
    from rich.table import Table

    import stg_trt
    from stg_trt.engines.auto_backend import choose_backend
    from stg_trt.system.gpu import find_gpu

    gpu = find_gpu()
    # "[tensorrt]" in a reason is the name of an extra, not markup.
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(f"stg_trt {stg_trt.__version__}, Python {platform.python_version()}, {platform.platform()}")
    console.print(_described(gpu))
    packages = Table("package", "version")
    for name in _PACKAGES:
        packages.add_row(name, installed_version(name) or "not installed")
    console.print(packages)
    states = Table("backend", "builds here", "runs here")
    for name, builds, runs in backend_states(gpu):
        states.add_row(name, builds, runs)
    console.print(states)
    choice = choose_backend(gpu)
    console.print(f"--backend auto: {choice.backend} for {choice.target}")
    console.print(f"CUDA kernels: {_kernels()}")


def backend_states(gpu: Gpu | None) -> list[tuple[str, str, str]]:
    """(backend, whether it builds here, whether it runs here), each yes or the reason why not."""
    from stg_trt.engines.auto_backend import why_not

    rtx = why_not("tensorrt-rtx", gpu)
    tensorrt = why_not("tensorrt", gpu)
    return [
        ("onnxruntime", "yes", "yes"),
        ("tensorrt-rtx", _builds_anywhere("tensorrt-rtx"), _answer(rtx)),
        ("tensorrt", _answer(tensorrt), _answer(tensorrt)),
        ("inductor", *_inductor_state(gpu)),
    ]


def _answer(reason: str | None) -> str:
    return "yes" if reason is None else f"no: {reason}"


def _builds_anywhere(backend: str) -> str:
    """For a backend that compiles with its library alone."""
    from stg_trt.engines.tensorrt_library import load_library
    from stg_trt.errors import BackendUnavailable

    try:
        load_library(backend)
    except BackendUnavailable as error:
        return _answer(str(error))
    return "yes"


def _inductor_state(gpu: Gpu | None) -> tuple[str, str]:
    """Whether it builds here and whether it runs here; engines for the CPU need no GPU."""
    from stg_trt.engines.auto_backend import why_not
    from stg_trt.engines.inductor_chain import check_compiler
    from stg_trt.errors import BackendUnavailable

    runs = "yes" if gpu is not None else "on the CPU only: there is no NVIDIA GPU"
    try:
        check_compiler("cpu")
    except BackendUnavailable as error:
        return _answer(str(error)), runs
    reason = why_not("inductor", gpu)
    return "yes" if reason is None else f"for the CPU only: {reason}", runs


def _described(gpu: Gpu | None) -> str:
    if gpu is None:
        return "GPU: none"
    memory = gpu.memory_bytes / GIB
    return f"GPU: {gpu.name}, {gpu.sm}, {memory:.0f} GiB, driver {gpu.driver}"


def _kernels() -> str:
    """Whether the library of `plugins/` is there, and of the right version."""
    from stg_trt.errors import BackendUnavailable
    from stg_trt.runtime.kernels.shared_library import load_kernels

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load_kernels()
    except BackendUnavailable as error:
        return str(error)
    return "built" if found is not None else "not built, torch operations run instead: run make kernels"
