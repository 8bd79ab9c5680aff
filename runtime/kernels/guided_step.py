"""Guidance, rescale and the solver's step, in one pass over the latents."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from .shared_library import DTYPES, Kernels, address

if TYPE_CHECKING:
    from ..state import StepState
    from ..step_key import StepKey

_TABLES = ("rescale", "noise_level", "latents_factor", "pred_factor", "initial_factor", "history_factors")


class GuidedStepParameters(ctypes.Structure):
    """`StgGuidedStep` of plugins/guided_step/guided_step.h, field for field."""

    _fields_ = (
        ("preds", ctypes.c_void_p),
        ("latents", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("rescale", ctypes.c_void_p),
        ("noise_level", ctypes.c_void_p),
        ("latents_factor", ctypes.c_void_p),
        ("pred_factor", ctypes.c_void_p),
        ("history", ctypes.c_void_p),
        ("initial", ctypes.c_void_p),
        ("initial_factor", ctypes.c_void_p),
        ("history_factors", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("counter", ctypes.c_void_p),
        ("finished", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("videos", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("frames", ctypes.c_int64),
        ("weights_stride", ctypes.c_int64),
        ("passes", ctypes.c_int32),
        ("cond", ctypes.c_int32),
        ("uncond", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("rescaled", ctypes.c_int32),
        ("single_step", ctypes.c_int32),
    )


class GuidedStepKernel:
    """guided_step for one state and key: parameters and scratch memory are made once."""

    def __init__(self, kernels: Kernels, state: StepState, key: StepKey) -> None:
        self._kernels = kernels
        device = state.latents.device
        videos, length = len(state.latents), state.latents[0].numel()
        of_prediction = () if key.rescale_space == "x0" else ("noise_level",)
        self._tables = state.table.device_values(*(name for name in _TABLES if name not in of_prediction))
        self._preds = state.pred_rows(key.groups)
        weights = state.table.weights
        self._finished = torch.zeros(1, dtype=torch.int32, device=device)
        self._workspace = torch.empty(kernels.workspace_bytes(videos), dtype=torch.uint8, device=device)
        history = state.history
        self._parameters = GuidedStepParameters(
            **{name: address(values) for name, values in self._tables.items()},
            preds=address(self._preds),
            latents=address(state.latents),
            weights=address(weights[0, key.groups.start :]),
            history=address(history),
            initial=address(state.initial) if history is not None else None,
            capacity=state.table.capacity,
            slots=state.table.slots,
            counter=address(state.table.counter),
            finished=address(self._finished),
            workspace=address(self._workspace),
            videos=videos,
            length=length,
            frames=weights.shape[2],
            weights_stride=weights.stride(0),
            passes=len(key.passes),
            cond=key.cond,
            uncond=-1 if key.zero_star is None else key.zero_star,
            dtype=DTYPES[self._preds.dtype],
            rescaled=key.rescaled,
            single_step=key.single_step,
        )

    def enqueue(self, stream: int) -> None:
        """One step."""
        self._kernels.enqueue("stg_guided_step", self._parameters, stream)
