"""The row fan-out in one launch, instead of an operation per pass and table."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from .shared_library import DTYPES, Kernels, address

if TYPE_CHECKING:
    from ..state import StepState


class FanOutRowsParameters(ctypes.Structure):
    """`StgFanOutRows` of plugins/fan_out_rows/fan_out_rows.h, field for field."""

    _fields_ = (
        ("latents", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("timestep_rows", ctypes.c_void_p),
        ("input_scale", ctypes.c_void_p),
        ("timestep", ctypes.c_void_p),
        ("counter", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("copies", ctypes.c_int64),
        ("timesteps", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


class FanOutRowsKernel:
    """`stg_trt.runtime.guided_step.fan_out_rows` for one state and set of row groups."""

    def __init__(self, kernels: Kernels, state: StepState, groups: range) -> None:
        self._kernels = kernels
        self._rows = state.input_rows(groups)
        self._timestep = state.buffers.view("timestep", groups)
        self._tables = state.table.device_values("input_scale", "timestep")
        assert self._timestep.dtype == torch.float32, "the kernel writes float32 timesteps"
        assert self._rows.numel() == len(groups) * state.latents.numel()
        self._parameters = FanOutRowsParameters(
            **{name: address(values) for name, values in self._tables.items()},
            latents=address(state.latents),
            rows=address(self._rows),
            timestep_rows=address(self._timestep),
            counter=address(state.table.counter),
            size=state.latents.numel(),
            copies=len(groups),
            timesteps=self._timestep.numel(),
            dtype=DTYPES[self._rows.dtype],
        )

    def enqueue(self, stream: int) -> None:
        """The rows of the step that the counter points at."""
        self._kernels.enqueue("stg_fan_out_rows", self._parameters, stream)
