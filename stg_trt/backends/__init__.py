"""The table of backends: what compiles segments to engines and runs them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stg_trt.engine import Engine
from stg_trt.errors import BackendUnavailable, InvalidRequest


@dataclass(frozen=True)
class Backend:
    """`module` has load(path) -> Engine; targets are what engines are compiled for, default first."""

    name: str
    module: str
    suffix: str
    precisions: tuple[str, ...]
    targets: tuple[str, ...]
    expand_masks: bool
    opset: int = 23


_RTX_TARGETS = ("sm_120", "sm_89", "sm_86", "sm_80", "sm_75", "sm_121")
_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("onnxruntime", "onnxruntime", ".onnx", ("fp32",), ("cpu",), expand_masks=True),
        Backend("tensorrt-rtx", "tensorrt", ".engine", ("bf16",), _RTX_TARGETS, expand_masks=False),
        Backend("tensorrt", "tensorrt", ".engine", ("bf16",), ("this-gpu",), expand_masks=False),
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


def load_engine(backend: str, paths: Sequence[Path]) -> Engine:
    """Loads an engine whose files were checked; raises BackendUnavailable where it cannot run here."""
    module = importlib.import_module(f"stg_trt.backends.{backend_for(backend).module}")
    try:
        engine: Engine = module.load(backend, paths[0])
    except ImportError as error:
        raise BackendUnavailable(
            f"{backend}: expected its library, got {error}: pip install 'stg-trt[{backend}]'"
        ) from error
    return engine
