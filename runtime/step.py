"""One whole step for one guidance state: row fan-out, the plan's engines, guidance and solver."""

from __future__ import annotations

import torch

from .bound_plan import BoundPlan
from .clean_latents import clean_latents
from .device import Device
from .operations import Operation
from .rank_group import RankGroup
from .state import RunState
from .step_key import StepKey


class Step:
    """Every run takes the step that the table's counter points at, and moves it on."""

    def __init__(
        self,
        key: StepKey,
        bound: BoundPlan,
        state: RunState,
        device: Device,
        ranks: RankGroup | None = None,
    ) -> None:
        self.key = key
        self.plan = bound.plan
        self._ranks = ranks
        self._stream = device.stream
        self._written = (
            *(stream.input_rows(key.groups) for stream in state.streams),
            *(stream.pred_rows(key.groups) for stream in state.streams),
            state.buffers.view("timestep", key.groups),
            *bound.written,
        )
        operations = device.operations
        fan_out = [
            device.named("fan_out", operations.fan_out_rows(stream, key.groups)) for stream in state.streams
        ]
        engines: list[Operation] = [bound.enqueue]
        if ranks is not None:
            own = self._own_rows(state)
            engines += [
                device.named("exchange", ranks.exchange(stream.pred_rows(key.groups), own))
                for stream in state.streams
            ]
        guided_step = [
            device.named("guided_step", operations.guided_step(stream, key)) for stream in state.streams
        ]
        self._operations = [*fan_out, *engines, *guided_step]
        if key.clean is not None:
            clean = clean_latents(state.video, key)
            before = clean.before_fan_out, *fan_out, clean.before_engines
            after = clean.after_engines, *guided_step, clean.after_solver
            self._operations = [*before, *engines, *after]

    def enqueue(self) -> None:
        """One step, in the order of the stream."""
        for operation in self._operations:
            operation(self._stream)

    def _own_rows(self, state: RunState) -> slice:
        """The rows of the predictions that the plan computes, among those of all passes."""
        if not self.plan.computed:
            return slice(0, 0)
        groups, first = self.plan.groups(self.plan.computed), self.key.groups.start
        videos = state.buffers.videos
        return slice((groups.start - first) * videos, (groups.stop - first) * videos)

    def every_rank(self, able: bool) -> bool:
        """Whether all ranks that take the step are able, if this one is."""
        return able if self._ranks is None else self._ranks.agree(able)

    def poison(self) -> None:
        """Fills every row that a step writes with NaN, so that a row left out shows in the predictions."""
        for tensor in self._written:
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
