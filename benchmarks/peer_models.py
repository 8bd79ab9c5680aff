"""The alternatives that diffusers users have today: the eager model, and compiled ones."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from stg_trt.errors import BackendUnavailable, InvalidRequest

PeerModel = Callable[[Any], Any]


def _eager(model: Any) -> Any:
    """The model itself."""
    return model


def _compiled(mode: str) -> PeerModel:
    """torch.compile in one of its modes, for the one shape that is measured."""
    return lambda model: torch.compile(model, mode=mode, dynamic=False)


def _torch_tensorrt(model: Any) -> Any:
    """torch.compile with TensorRT behind it, in the precision that the weights have."""
    try:
        import_module("torch_tensorrt")
    except (ImportError, OSError) as error:
        # OSError: its wheel loads libraries of the CUDA and the TensorRT that it was built for.
        raise BackendUnavailable(f"torch_tensorrt cannot be imported: {_first_line(error)}") from error
    return torch.compile(
        model, backend="torch_tensorrt", dynamic=False, options={"use_explicit_typing": True}
    )


# In the order in which they are measured: the last are the first to be lost when time is up.
PEERS: dict[str, PeerModel] = {
    "eager": _eager,
    "compiled": _compiled("default"),
    "compiled_max_autotune": _compiled("max-autotune"),
    "torch_tensorrt": _torch_tensorrt,
}


def check_peers(names: tuple[str, ...]) -> None:
    """Raises InvalidRequest unless all are peers, and there is one."""
    unknown = sorted(set(names) - PEERS.keys())
    if unknown or not names:
        raise InvalidRequest(
            f"peers: expected some of {', '.join(PEERS)}, got {', '.join(unknown) or 'none'}: correct them"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
