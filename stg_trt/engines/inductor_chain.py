"""The parts of an inductor engine: pieces that run one after the other, and the machine they need."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pydantic
import torch

from stg_trt.engines.cuda_toolkit import cuda_toolkit
from stg_trt.errors import BackendUnavailable, EngineRejected
from stg_trt.models.tensor_spec import TensorSpec

METADATA_KEY = "chain"


@dataclass(frozen=True)
class Piece:
    """One call of a compiled package; its weights are named `<place in the chain>.<name in the package>`."""

    package: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """A segment as the header of its weights file describes it; `tensors` are all that cross a border."""

    torch: str
    machine: tuple[str, ...]
    max_rows: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: tuple[TensorSpec, ...]
    pieces: tuple[Piece, ...]

    def to_metadata(self) -> dict[str, str]:
        """For the safetensors header."""
        return {METADATA_KEY: _CHAIN.dump_json(self).decode()}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str] | None, path: Path) -> Chain:
        """The chain of a weights file; raises EngineRejected if it has none."""
        try:
            return _CHAIN.validate_json((metadata or {})[METADATA_KEY])
        except (KeyError, pydantic.ValidationError) as error:
            raise EngineRejected(
                f"{path}: expected the weights of an inductor engine, got another file: "
                "build the engines again"
            ) from error


_CHAIN = pydantic.TypeAdapter(Chain)


def machine_facts(device: str) -> tuple[str, ...]:
    """Facts that compiled code relies on: the CPU's instruction sets and, on cuda, the GPU's architecture."""
    facts = [platform.system().lower(), *(name for name, has in _cpu_capabilities() if has is True)]
    if device == "cuda":
        facts.append("sm_{}{}".format(*torch.cuda.get_device_capability()))
    return platform.machine(), *sorted(facts)


def check_machine(chain: Chain, device: str, path: Path) -> None:
    """Raises EngineRejected if the code of the packages would fault or miscompute on this machine."""
    if chain.torch != torch.__version__:
        raise EngineRejected(
            f"{path}: expected torch {chain.torch}, which it was built with, got {torch.__version__}: "
            "build the engines again here"
        )
    missing = sorted(set(chain.machine) - set(machine_facts(device)))
    if missing:
        here = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
        raise EngineRejected(
            f"{path}: expected a machine with {', '.join(missing)}, got {here} without it: "
            "build the engines again here"
        )


def check_compiler(device: str) -> None:
    """Raises BackendUnavailable if torch's compiler cannot build for the device (cpu, or cuda)."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise BackendUnavailable(
            f"inductor: expected a C++ compiler, got no {compiler} on the PATH: "
            "install g++ or set CXX to a compiler"
        )
    if not hasattr(torch.cpu, "get_capabilities"):
        raise BackendUnavailable(
            f"inductor: expected a torch that names the CPU's instruction sets, got {torch.__version__}: "
            "install a newer one"
        )
    if device == "cuda":
        _check_cuda()


def _check_cuda() -> None:
    """A GPU, the compiler of its kernels, and the headers of the code that launches them."""
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            "inductor: expected an NVIDIA GPU for --target this-gpu, got none: use --target cpu"
        )
    if find_spec("triton") is None:
        raise BackendUnavailable(
            "inductor: expected the Python module triton, got no such module: pip install triton"
        )
    if cuda_toolkit() is None:
        from torch.utils.cpp_extension import CUDA_HOME

        raise BackendUnavailable(
            f"inductor: expected the CUDA toolkit, got no include/cuda.h in {CUDA_HOME}: "
            "install it or set CUDA_HOME to it"
        )


def _cpu_capabilities() -> list[tuple[str, object]]:
    return list(torch.cpu.get_capabilities().items())
