"""`stg-trt doctor`: what this machine has, which backends work and why the others do not."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "tensorrt-rtx-cu13",
    "tensorrt-cu13",
)


def doctor() -> None:
    """Show versions, the GPU, and which backends work here."""
    from rich.console import Console
    from rich.table import Table

    import stg_trt

    # "[tensorrt]" in a reason is the name of an extra, not markup.
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(f"stg_trt {stg_trt.__version__}, Python {platform.python_version()}, {platform.platform()}")
    console.print(f"GPU: {_gpu()}")
    packages = Table("package", "version")
    for name in _PACKAGES:
        packages.add_row(name, _version(name) or "not installed")
    console.print(packages)
    states = Table("backend", "builds here", "runs here")
    for name, builds, runs in backend_states():
        states.add_row(name, builds, runs)
    console.print(states)


def backend_states() -> list[tuple[str, str, str]]:
    """(backend, whether it builds here, whether it runs here), each yes or the reason why not."""
    from stg_trt.backends import backends
    from stg_trt.backends.tensorrt_library import load_library
    from stg_trt.errors import BackendUnavailable

    states = []
    for backend in backends():
        if backend.name == "onnxruntime":
            states.append((backend.name, "yes", "yes"))
            continue
        if backend.name == "inductor":
            states.append((backend.name, *_inductor_state()))
            continue
        try:
            load_library(backend.name)
        except BackendUnavailable as error:
            states.append((backend.name, f"no: {error}", "no: not installed"))
            continue
        builds = "yes" if backend.name == "tensorrt-rtx" or _has_gpu() else "no: its builder needs a GPU"
        states.append((backend.name, builds, "yes" if _has_gpu() else "no: there is no NVIDIA GPU"))
    return states


def _inductor_state() -> tuple[str, str]:
    """Whether it builds here and whether it runs here: what runs on a CPU needs no GPU."""
    from stg_trt.backends.inductor_chain import check_compiler
    from stg_trt.errors import BackendUnavailable

    refused = {}
    for device in ("cpu", "cuda"):
        try:
            check_compiler(device)
        except BackendUnavailable as error:
            refused[device] = str(error)
    builds = "yes"
    if refused:
        builds = f"no: {refused['cpu']}" if "cpu" in refused else f"for the CPU only: {refused['cuda']}"
    return builds, "yes" if _has_gpu() else "on the CPU only: there is no NVIDIA GPU"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
