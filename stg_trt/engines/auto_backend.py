"""Chooses the best backend for this machine: `--backend auto`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from stg_trt.errors import BackendUnavailable
from stg_trt.system.gpu import Gpu

AUTO = "auto"
_log = logging.getLogger(__name__)
# TensorRT 11 starts at Turing.
_OLDEST_SM = 75
# Hopper and the A100 are not RTX cards, though engines for the latter can be compiled anywhere.
_RTX_SMS = ("sm_75", "sm_86", "sm_89", "sm_120", "sm_121")


@dataclass(frozen=True)
class Choice:
    """A backend and its target, and why each better one was passed over."""

    backend: str
    target: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        passed_over = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        return f"backend: {self.backend} for {self.target}{passed_over}"


def choose_backend(gpu: Gpu | None) -> Choice:
    """TensorRT if it is installed and supports the GPU, else inductor, else ONNX Runtime on the CPU."""
    choice = _best(gpu)
    _log.info("%s", choice)
    return choice


def _best(gpu: Gpu | None) -> Choice:
    if gpu is None:
        return Choice("onnxruntime", "cpu", ("there is no NVIDIA GPU",))
    reasons: list[str] = []
    for name, target in _GPU_TARGETS.items():
        try:
            return Choice(name, target(gpu), tuple(reasons))
        except BackendUnavailable as error:
            reasons.append(str(error))
    return Choice("onnxruntime", "cpu", tuple(reasons))


def why_not(backend: str, gpu: Gpu | None) -> str | None:
    """Why a backend's engines cannot run on the GPU of this machine; None if they can."""
    try:
        _GPU_TARGETS[backend](gpu)
    except BackendUnavailable as error:
        return str(error)
    return None


def _tensorrt_target(gpu: Gpu | None) -> str:
    from stg_trt.engines.tensorrt_library import load_library

    found = _needed("tensorrt", gpu)
    if int(found.sm.removeprefix("sm_")) < _OLDEST_SM:
        raise BackendUnavailable(
            f"tensorrt: expected a GPU from sm_{_OLDEST_SM} on, got {found.name} ({found.sm}): "
            "use another backend"
        )
    load_library("tensorrt")
    return "this-gpu"


def _rtx_target(gpu: Gpu | None) -> str:
    from stg_trt.engines.tensorrt_library import load_library

    found = _needed("tensorrt-rtx", gpu)
    if found.sm not in _RTX_SMS:
        raise BackendUnavailable(
            f"tensorrt-rtx: expected an RTX card ({', '.join(_RTX_SMS)}), got {found.name} ({found.sm}): "
            "use tensorrt or inductor"
        )
    load_library("tensorrt-rtx")
    return found.sm


def _inductor_target(gpu: Gpu | None) -> str:
    from stg_trt.engines.inductor_chain import check_compiler

    _needed("inductor", gpu)
    check_compiler("cuda")
    return "this-gpu"


def _needed(backend: str, gpu: Gpu | None) -> Gpu:
    if gpu is None:
        raise BackendUnavailable(f"{backend}: expected an NVIDIA GPU, got none: use onnxruntime")
    return gpu


# The best first.
_GPU_TARGETS: dict[str, Callable[[Gpu | None], str]] = {
    "tensorrt": _tensorrt_target,
    "tensorrt-rtx": _rtx_target,
    "inductor": _inductor_target,
}
