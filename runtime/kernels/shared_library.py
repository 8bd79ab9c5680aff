"""The compiled library of kernels, and how one of them is called."""

from __future__ import annotations

import ctypes
import logging
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from stg_trt.errors import BackendUnavailable
from stg_trt.system.files import LIBRARIES

_log = logging.getLogger(__name__)
ABI = 5
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_LIBRARY = LIBRARIES / "libstg_kernels.so"
_KERNELS = ("stg_copy_rows", "stg_fan_out_rows", "stg_guided_step", "stg_qk_norm_rope")


class Kernels:
    """The loaded library; raises BackendUnavailable if it is none, or of another version."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendUnavailable(f"kernels: expected {path}, got {error}: run make kernels") from error
        found = self._library.stg_kernels_abi()
        if found != ABI:
            raise BackendUnavailable(
                f"kernels: expected interface {ABI}, got {found} in {path}: run make kernels again"
            )
        self._library.stg_guided_step_workspace.restype = ctypes.c_int64
        self._library.stg_guided_step_workspace.argtypes = [ctypes.c_int64]
        for name in _KERNELS:
            getattr(self._library, name).argtypes = [ctypes.c_void_p, ctypes.c_void_p]

    def workspace_bytes(self, videos: int) -> int:
        """Device memory for guided_step's statistics of `videos`."""
        return int(self._library.stg_guided_step_workspace(videos))

    def enqueue(self, name: str, parameters: ctypes.Structure, stream: int) -> None:
        """Enqueues a kernel on a CUDA stream; raises RuntimeError with CUDA's error number."""
        error = getattr(self._library, name)(ctypes.byref(parameters), stream)
        if error:
            raise RuntimeError(f"{name}: CUDA error {error}")


@cache
def load_kernels() -> Kernels | None:
    """The kernels; None, with one warning, if they were not built. BackendUnavailable for a wrong version."""
    if not _LIBRARY.exists():
        _log.info("no kernels: %s is not built", _LIBRARY)
        warnings.warn(
            f"kernels: {_LIBRARY} is not built, steps run as torch operations: run make kernels",
            stacklevel=2,
        )
        return None
    _log.info("kernels of %s", _LIBRARY)
    return Kernels(_LIBRARY)


def address(tensor: Tensor | None) -> int | None:
    """The address of a contiguous tensor; None for None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()
