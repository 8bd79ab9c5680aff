"""A step plan over engines and static buffers: everything is bound once, then the step is enqueued."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from stg_trt.engines.engine import Context, Engine
from stg_trt.models.families.keep_flags import KEEP_FLAGS
from stg_trt.models.passes import COND, Pass
from stg_trt.models.plan import SegmentRun, StepPlan
from stg_trt.models.segment import Segment, engine_outputs
from stg_trt.models.tensor_spec import index_of, kept_name

from .device import Device
from .operations import Operation
from .state import StepBuffers

Names = tuple[str, ...]


class BoundPlan:
    """One plan, bound; `enqueue` runs it on the buffers' current inputs.

    `written` is all the memory that it writes; a run reads none of it before that.
    """

    def __init__(
        self,
        plan: StepPlan,
        engines: Mapping[str, Engine],
        buffers: StepBuffers,
        borders: Callable[[Segment], tuple[Names, Names]],
        device: Device,
    ) -> None:
        self.plan = plan
        self.written: list[Tensor] = []
        self._buffers = buffers
        self._device = device
        self._operations: list[Operation] = []
        self._turns = buffers.first_turns(plan.expert)
        # The passes whose rows a tensor has, of all that a run has written.
        self._made: dict[str, tuple[Pass, ...]] = {}
        every = [borders(run.segment) for run in plan.runs]
        for place, run in enumerate(plan.runs):
            self._fork(run.forks, every[place:])
            self._add(run, engines[run.segment.name], *every[place])

    def enqueue(self, stream: int = 0) -> None:
        """Runs the plan's segments and row copies in order."""
        for operation in self._operations:
            operation(stream)

    def _fork(self, forks: Sequence[Pass], following: Sequence[tuple[Names, Names]]) -> None:
        """The rows of forks start as cond's, in what the following runs read; an index needs no copy."""
        names = [name for name in self._made if self._buffers.has_rows(name) and _is_read(name, following)]
        self._copy(
            (self._current(name, (fork,)), self._current(name, (COND,))) for name in names for fork in forks
        )

    def _add(self, run: SegmentRun, engine: Engine, inputs: Names, outputs: Names) -> None:
        context = engine.context()
        before = [
            (name, one, self._current(name, (one,)))
            for name in inputs
            if name in outputs
            for one in run.bypassed
        ]
        self._bind_inputs(context, engine.alignment, run, inputs)
        results = []
        for name, engine_name in zip(outputs, engine_outputs(inputs, outputs), strict=True):
            self._turns[name] = self._turns.get(name, 0) + (name in inputs)
            self._made[name] = run.passes
            tensor = self._current(name, run.passes)
            results.append((tensor, _aligned(tensor, engine.alignment)))
            context.bind(engine_name, results[-1][1])
            self.written.append(results[-1][1])
        self._operations.append(self._device.named(run.segment.name, context.enqueue))
        self._copy(results)
        self._copy((self._current(name, (one,)), rows) for name, one, rows in before)

    def _bind_inputs(self, context: Context, alignment: int, run: SegmentRun, inputs: Names) -> None:
        to_aligned = []
        for name in inputs:
            tensor = self._input(name, run, inputs)
            aligned = _aligned(tensor, alignment)
            to_aligned.append((aligned, tensor))
            context.bind(name, aligned)
        self._copy(to_aligned)

    def _input(self, name: str, run: SegmentRun, inputs: Names) -> Tensor:
        if name in KEEP_FLAGS:
            return self._buffers.flags([run.keeps(name, one) for one in run.passes])
        if (kept := kept_name(name)) is not None:
            made = self._made[kept]
            return self._buffers.index([made.index(one if one in made else COND) for one in run.passes])
        return self._current(name, self._made[name] if index_of(name) in inputs else run.passes)

    def _current(self, name: str, passes: Sequence[Pass]) -> Tensor:
        return self._buffers.view(name, self.plan.groups(passes), self._turns.get(name, 0))

    def _copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """One operation for each (destination, source), except pairs that are the same tensor twice."""
        differing = [(destination, source) for destination, source in pairs if destination is not source]
        if not differing:
            return
        self.written += [destination for destination, _ in differing]
        self._operations.append(self._device.named("copy_rows", self._device.operations.copy_rows(differing)))


def _is_read(name: str, following: Sequence[tuple[Names, Names]]) -> bool:
    """Whether a run reads the tensor as it is now, and not by an index."""
    for inputs, outputs in following:
        if name in inputs:
            return index_of(name) not in inputs
        if name in outputs:
            return False
    return False


def _aligned(tensor: Tensor, alignment: int) -> Tensor:
    """The tensor, or memory of its own if the rows of a pass do not start at an aligned address."""
    return torch.empty_like(tensor) if tensor.data_ptr() % alignment else tensor
