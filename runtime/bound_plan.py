"""A step plan over engines and static buffers: everything is bound once, then the step is enqueued."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from stg_trt.engines.engine import Engine
from stg_trt.models.families.base import KEEP_ATTENTION
from stg_trt.models.plan import SegmentRun, StepPlan
from stg_trt.models.segment import Segment, engine_outputs

from .kernels.copy_rows import CopyRowsKernel, copy_rows
from .kernels.shared_library import kernels_for
from .state import StepBuffers

Operation = Callable[[int], None]


class BoundPlan:
    """One plan, bound; `enqueue` runs it on the buffers' current inputs."""

    def __init__(
        self,
        plan: StepPlan,
        engines: Mapping[str, Engine],
        buffers: StepBuffers,
        borders: Callable[[Segment], tuple[tuple[str, ...], tuple[str, ...]]],
    ) -> None:
        self.plan = plan
        self._buffers = buffers
        self._operations: list[Operation] = []
        self._side: dict[str, int] = {}
        self._written: dict[str, None] = {}
        for run in plan.runs:
            self._add(run, engines[run.segment.name], *borders(run.segment))

    def enqueue(self, stream: int = 0) -> None:
        """Runs the plan's segments and row copies in order."""
        for operation in self._operations:
            operation(stream)

    def _add(
        self, run: SegmentRun, engine: Engine, inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> None:
        if run.fork:
            self._copy(
                (self._current(name, ("skip",)), self._current(name, ("cond",))) for name in self._written
            )
        context = engine.context()
        before = {name: self._current(name, ("skip",)) for name in inputs if name in outputs}
        to_aligned = []
        for name in inputs:
            if name == KEEP_ATTENTION:
                tensor = self._buffers.keep_attention(run.groups, run.perturbed)
            else:
                tensor = self._current(name, run.groups)
            aligned = _aligned(tensor, engine.alignment)
            to_aligned.append((aligned, tensor))
            context.bind(name, aligned)
        self._copy(to_aligned)
        results = []
        for name, engine_name in zip(outputs, engine_outputs(inputs, outputs), strict=True):
            self._side[name] = self._side.get(name, 0) + (name in inputs)
            tensor = self._current(name, run.groups)
            results.append((tensor, _aligned(tensor, engine.alignment)))
            context.bind(engine_name, results[-1][1])
            if self._buffers.has_rows(name):
                self._written[name] = None
        self._operations.append(context.enqueue)
        self._copy(results)
        if run.bypass:
            self._copy((self._current(name, ("skip",)), rows) for name, rows in before.items())

    def _current(self, name: str, groups: Sequence[str]) -> Tensor:
        return self._buffers.view(name, groups, self._side.get(name, 0))

    def _copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """One operation that copies each (destination, source), but for tensors that are their own source."""
        differing = [(destination, source) for destination, source in pairs if destination is not source]
        if not differing:
            return
        kernels = kernels_for(differing[0][0].device)
        if kernels is not None:
            self._operations.append(CopyRowsKernel(kernels, differing).enqueue)
        else:
            self._operations.append(lambda stream: copy_rows(differing))


def _aligned(tensor: Tensor, alignment: int) -> Tensor:
    """The tensor, or memory of its own where the rows of a group do not start at an aligned address."""
    return torch.empty_like(tensor) if tensor.data_ptr() % alignment else tensor
