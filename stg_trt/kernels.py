"""The CUDA kernels of `plugins/`, loaded without a compiler; without them the torch reference runs."""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stg_trt.errors import BackendUnavailable

if TYPE_CHECKING:
    from stg_trt.guided_step import StepState

ABI = 1
_LIBRARY = Path(__file__).parent / "lib" / "libstg_kernels.so"
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_FLOATS = ctypes.c_void_p


class GuidedStepParameters(ctypes.Structure):
    """`StgGuidedStep` of plugins/guided_step/guided_step.h, field for field."""

    _fields_ = (
        ("cond", _FLOATS),
        ("uncond", _FLOATS),
        ("skip", _FLOATS),
        ("latents", _FLOATS),
        ("cfg_scale", _FLOATS),
        ("stg_scale", _FLOATS),
        ("rescale", _FLOATS),
        ("latents_factor", _FLOATS),
        ("pred_factor", _FLOATS),
        ("history", _FLOATS),
        ("initial", _FLOATS),
        ("initial_factor", _FLOATS),
        ("history_factors", _FLOATS),
        ("capacity", ctypes.c_int64),
        ("counter", ctypes.c_void_p),
        ("finished", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("videos", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("rescaled", ctypes.c_int32),
        ("two_term", ctypes.c_int32),
    )


class Kernels:
    """The loaded library."""

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
        self._library.stg_guided_step.argtypes = [ctypes.POINTER(GuidedStepParameters), ctypes.c_void_p]

    def workspace_bytes(self, videos: int) -> int:
        """Device memory for the statistics of `videos`."""
        return int(self._library.stg_guided_step_workspace(videos))

    def guided_step(self, parameters: GuidedStepParameters, stream: int) -> None:
        """Enqueues the step; raises RuntimeError with CUDA's error number."""
        error = self._library.stg_guided_step(ctypes.byref(parameters), stream)
        if error:
            raise RuntimeError(f"guided_step: CUDA error {error}")


@cache
def load_kernels() -> Kernels | None:
    """The kernels, or None, said once, where they were not built; BackendUnavailable for a wrong version."""
    if not _LIBRARY.exists():
        warnings.warn(
            f"kernels: {_LIBRARY} is not built, guidance runs as torch operations: run make kernels",
            stacklevel=2,
        )
        return None
    return Kernels(_LIBRARY)


class GuidedStepKernel:
    """guided_step for one state and set of passes: parameters and scratch memory are made once."""

    def __init__(
        self,
        kernels: Kernels,
        state: StepState,
        passes: tuple[str, ...],
        *,
        rescaled: bool,
        two_term: bool,
    ) -> None:
        self._kernels = kernels
        device = state.latents.device
        videos, length = len(state.latents), state.latents[0].numel()
        self._rows = {group: state.buffers.view("pred", (group,)) for group in passes}
        self._finished = torch.zeros(1, dtype=torch.int32, device=device)
        self._workspace = torch.empty(kernels.workspace_bytes(videos), dtype=torch.uint8, device=device)
        history = state.history
        self._parameters = GuidedStepParameters(
            **{group: _address(rows) for group, rows in self._rows.items()},
            **{name: _address(values) for name, values in state.table.device_values().items()},
            latents=_address(state.latents),
            history=_address(history) if history is not None else None,
            initial=_address(state.initial) if history is not None else None,
            capacity=state.table.capacity,
            counter=_address(state.table.counter),
            finished=_address(self._finished),
            workspace=_address(self._workspace),
            videos=videos,
            length=length,
            dtype=_DTYPES[self._rows["cond"].dtype],
            rescaled=rescaled,
            two_term=two_term,
        )

    def enqueue(self, stream: int) -> None:
        """One step."""
        self._kernels.guided_step(self._parameters, stream)


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()
