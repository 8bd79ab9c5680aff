"""A step plan over engines and static buffers: everything is bound once, then the step is enqueued."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from stg_trt.engines.engine import Engine
from stg_trt.models.families.base import KEEP_ATTENTION
from stg_trt.models.passes import COND, Pass
from stg_trt.models.plan import SegmentRun, StepPlan
from stg_trt.models.segment import Segment, engine_outputs

from .device import Device
from .operations import Operation
from .state import StepBuffers


class BoundPlan:
    """One plan, bound; `enqueue` runs it on the buffers' current inputs.

    `written` is all the memory that it writes; a run reads none of it before that.
    """

    def __init__(
        self,
        plan: StepPlan,
        engines: Mapping[str, Engine],
        buffers: StepBuffers,
        borders: Callable[[Segment], tuple[tuple[str, ...], tuple[str, ...]]],
        device: Device,
    ) -> None:
        self.plan = plan
        self.written: list[Tensor] = []
        self._buffers = buffers
        self._device = device
        self._operations: list[Operation] = []
        self._turns = buffers.first_turns(plan.expert)
        self._row_outputs: dict[str, None] = {}
        for run in plan.runs:
            self._add(run, engines[run.segment.name], *borders(run.segment))

    def enqueue(self, stream: int = 0) -> None:
        """Runs the plan's segments and row copies in order."""
        for operation in self._operations:
            operation(stream)

    def _add(
        self, run: SegmentRun, engine: Engine, inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> None:
        if run.forks:
            self._copy(
                (self._current(name, (fork,)), self._current(name, (COND,)))
                for name in self._row_outputs
                for fork in run.forks
            )
        context = engine.context()
        before = [
            (name, one, self._current(name, (one,)))
            for name in inputs
            if name in outputs
            for one in run.bypassed
        ]
        to_aligned = []
        for name in inputs:
            if name == KEEP_ATTENTION:
                tensor = self._buffers.keep_attention([one not in run.perturbed for one in run.passes])
            else:
                tensor = self._current(name, run.passes)
            aligned = _aligned(tensor, engine.alignment)
            to_aligned.append((aligned, tensor))
            context.bind(name, aligned)
        self._copy(to_aligned)
        results = []
        for name, engine_name in zip(outputs, engine_outputs(inputs, outputs), strict=True):
            self._turns[name] = self._turns.get(name, 0) + (name in inputs)
            tensor = self._current(name, run.passes)
            results.append((tensor, _aligned(tensor, engine.alignment)))
            context.bind(engine_name, results[-1][1])
            self.written.append(results[-1][1])
            if self._buffers.has_rows(name):
                self._row_outputs[name] = None
        self._operations.append(self._device.named(run.segment.name, context.enqueue))
        self._copy(results)
        self._copy((self._current(name, (one,)), rows) for name, one, rows in before)

    def _current(self, name: str, passes: Sequence[Pass]) -> Tensor:
        return self._buffers.view(name, self.plan.groups(passes), self._turns.get(name, 0))

    def _copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """One operation for each (destination, source), except pairs that are the same tensor twice."""
        differing = [(destination, source) for destination, source in pairs if destination is not source]
        if not differing:
            return
        self.written += [destination for destination, _ in differing]
        self._operations.append(self._device.named("copy_rows", self._device.operations.copy_rows(differing)))


def _aligned(tensor: Tensor, alignment: int) -> Tensor:
    """The tensor, or memory of its own if the rows of a pass do not start at an aligned address."""
    return torch.empty_like(tensor) if tensor.data_ptr() % alignment else tensor
