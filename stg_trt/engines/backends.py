"""The table of backends, which compile segments to engines and run them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stg_trt.engines.engine import Engine
from stg_trt.errors import InvalidRequest
from stg_trt.models.workload import FLOAT8
from stg_trt.system.stream import Stream


@dataclass(frozen=True)
class Target:
    """A place to compile for: the device that runs the engines (cpu, cuda), its precisions, default first."""

    name: str
    device: str
    precisions: tuple[str, ...]

    def activations(self, precision: str) -> str | None:
        """The precision around FP8 products, where it is not bf16."""
        return "fp32" if precision == FLOAT8 and "bf16" not in self.precisions else None


@dataclass(frozen=True)
class Backend:
    """`module` has load_all(backend, files, device); the default target comes first.

    Engines that `limits_rows` take no more rows than they were compiled for.
    """

    name: str
    module: str
    targets: tuple[Target, ...]
    limits_rows: bool = True

    def target(self, name: str) -> Target:
        """The target of that name; raises InvalidRequest for an unknown one."""
        for target in self.targets:
            if target.name == name:
                return target
        names = ", ".join(target.name for target in self.targets)
        raise InvalidRequest(
            f"target: expected one of {names} for {self.name}, got {name!r}: choose one of them"
        )


THIS_GPU = "this-gpu"
"""The target of backends whose engines are compiled on, and for, the GPU of this machine."""

_FLOAT8_SM = 89
_CPU = Target("cpu", "cpu", ("fp32", FLOAT8))
_RTX_TARGETS = ("sm_120", "sm_89", "sm_86", "sm_80", "sm_75", "sm_121")


def _rtx_target(sm: str) -> Target:
    return Target(sm, "cuda", ("bf16", FLOAT8) if _has_float8(sm) else ("bf16",))


def _has_float8(sm: str) -> bool:
    return int(sm.removeprefix("sm_")) >= _FLOAT8_SM


_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("onnxruntime", "onnxruntime", (_CPU,), limits_rows=False),
        Backend("tensorrt-rtx", "tensorrt", tuple(_rtx_target(name) for name in _RTX_TARGETS)),
        Backend("tensorrt", "tensorrt", (Target(THIS_GPU, "cuda", ("bf16", FLOAT8)),)),
        Backend(
            "inductor",
            "inductor",
            (Target(THIS_GPU, "cuda", ("bf16",)), Target("cpu", "cpu", ("fp32", "bf16"))),
        ),
    )
}


def backends() -> tuple[Backend, ...]:
    """Every backend, the embedded default first."""
    return tuple(_BACKENDS.values())


def backend_for(name: str) -> Backend:
    """The backend of that name; raises InvalidRequest for an unknown one."""
    if name not in _BACKENDS:
        raise InvalidRequest(
            f"backend: expected one of {', '.join(_BACKENDS)}, got {name!r}: choose one of them"
        )
    return _BACKENDS[name]


def check_target(backend: Backend, target: str, precision: str) -> None:
    """Raises InvalidRequest if the backend does not know the target, or the target lacks the precision."""
    precisions = backend.target(target).precisions
    if target.startswith("sm_"):
        check_float8(target, precision)
    if precision not in precisions:
        raise InvalidRequest(
            f"precision: expected {' or '.join(precisions)} for {backend.name}, got {precision!r}: "
            f"use --precision {precisions[0]} or another backend"
        )


def check_float8(sm: str, precision: str) -> None:
    """Raises InvalidRequest for FP8 on a GPU, such as sm_86, that has no products of it."""
    if precision == FLOAT8 and not _has_float8(sm):
        raise InvalidRequest(
            f"precision: expected a GPU of sm_{_FLOAT8_SM} or later (Ada, Hopper, Blackwell) for fp8, got "
            f"{sm}: use --precision bf16"
        )


def load_engines(backend: str, files: Mapping[str, Sequence[Path]], stream: Stream) -> dict[str, Engine]:
    """Loads engines by segment name from checked files; an engine's own file comes first.

    Raises BackendUnavailable if they cannot run here, EngineRejected if they were built for another machine.
    """
    module = importlib.import_module(f"stg_trt.engines.{backend_for(backend).module}")
    engines: dict[str, Engine] = module.load_all(backend, files, stream.torch_device)
    return engines
