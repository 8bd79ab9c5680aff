"""Compiles what lies in `plugins/` for the tests: with nvcc, or with g++ for an emulation on the host."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from stg_trt.runtime.kernels.shared_library import Kernels

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
CUDA_ON_HOST = ROOT / "tests" / "plugins" / "cuda_on_host"

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@dataclass(frozen=True)
class Machine:
    """Kernels, and the memory they work on."""

    kernels: Kernels
    device: torch.device

    def enqueue(self, kernel: object) -> None:
        """Enqueues on torch's stream."""
        stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else 0
        kernel.enqueue(stream)  # type: ignore[attr-defined]


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """A command's output; fails the test if the command fails."""
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env)
    assert result.returncode == 0, f"{result.returncode}: {result.stdout}{result.stderr}"
    return result.stdout


def kernel_sources() -> list[Path]:
    """The sources of the library of kernels."""
    return [PLUGINS / "interface.cpp", *sorted(PLUGINS.glob("*/*.cu"))]


def compile_kernels(path: Path) -> Path:
    """For one architecture: that of the GPU, or sm_90."""
    native = "native" if torch.cuda.is_available() else "sm_90"
    architecture = os.environ.get("STG_TRT_TEST_ARCHITECTURE", native)
    options = ["-O3", "-std=c++17", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC"]
    run("nvcc", *options, "-I", PLUGINS, *kernel_sources(), "-o", path)
    return path


def compile_on_host(*options: str | Path, sources: Sequence[Path]) -> None:
    """With g++ and the emulation of CUDA; a vector at an address that a GPU would refuse ends the process."""
    checks = ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
    folders: list[str | Path] = ["-I", CUDA_ON_HOST, "-I", PLUGINS]
    emulation = [path for path in CUDA_ON_HOST.glob("*.cpp") if not path.stem.endswith("_test")]
    run("g++", "-O1", "-std=c++17", *checks, *folders, *options, *emulation, "-x", "c++", *sources)


def compile_host_kernels(path: Path) -> Path:
    """The same kernels over host memory."""
    compile_on_host("-shared", "-fPIC", "-o", path, sources=kernel_sources())
    return path


def layout_in_header(header: str, struct: str, names: list[str], folder: Path) -> list[int]:
    """Offsets of a struct's fields, then its size, as the C++ compiler sees them."""
    prints = "".join(f'printf("%zu\\n", offsetof({struct}, {name}));' for name in names)
    source = folder / "layout.cpp"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{header}"\n'
        f'int main() {{ {prints} printf("%zu\\n", sizeof({struct})); }}\n'
    )
    run("g++", "-I", PLUGINS, source, "-o", folder / "layout")
    return [int(line) for line in run(folder / "layout").split()]


def layout_in_python(struct: type[ctypes.Structure]) -> list[int]:
    """The same of a ctypes structure."""
    offsets = [getattr(struct, name).offset for name, *_ in struct._fields_]
    return [*offsets, ctypes.sizeof(struct)]
