"""The table of backends: what compiles segments to engines and runs them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stg_trt.device import Device
from stg_trt.engine import Engine
from stg_trt.errors import InvalidRequest


@dataclass(frozen=True)
class Backend:
    """`module` has load_all(backend, paths, device); targets are what is compiled for, default first.

    `device` is where its engines run: cpu, or cuda.
    """

    name: str
    module: str
    suffix: str
    precisions: tuple[str, ...]
    targets: tuple[str, ...]
    expand_masks: bool
    device: str
    opset: int = 23


_RTX_TARGETS = ("sm_120", "sm_89", "sm_86", "sm_80", "sm_75", "sm_121")
_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("onnxruntime", "onnxruntime", ".onnx", ("fp32",), ("cpu",), True, "cpu"),
        Backend("tensorrt-rtx", "tensorrt", ".engine", ("bf16",), _RTX_TARGETS, False, "cuda"),
        Backend("tensorrt", "tensorrt", ".engine", ("bf16",), ("this-gpu",), False, "cuda"),
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
    """Raises InvalidRequest where a backend does not know the target or the precision."""
    if target not in backend.targets:
        raise InvalidRequest(
            f"target: expected one of {', '.join(backend.targets)} for {backend.name}, got {target!r}: "
            "choose one of them"
        )
    if precision not in backend.precisions:
        raise InvalidRequest(
            f"precision: expected {' or '.join(backend.precisions)} for {backend.name}, got {precision!r}: "
            f"use --precision {backend.precisions[0]} or another backend"
        )


def load_engines(backend: str, paths: Mapping[str, Path], device: Device) -> dict[str, Engine]:
    """Loads engines by segment, after their files were checked; BackendUnavailable where they cannot run."""
    module = importlib.import_module(f"stg_trt.backends.{backend_for(backend).module}")
    engines: dict[str, Engine] = module.load_all(backend, paths, device.torch_device)
    return engines
