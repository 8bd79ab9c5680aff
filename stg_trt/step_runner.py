"""A step plan over engines and static buffers: everything is bound once, then the step is enqueued."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from stg_trt.engine import Engine
from stg_trt.families.base import KEEP_ATTENTION
from stg_trt.kernels.copy_rows import CopyRowsKernel, copy_rows
from stg_trt.kernels.shared_library import kernels_for
from stg_trt.segment import Segment, engine_outputs
from stg_trt.step_plan import GROUPS, SegmentRun, StepPlan
from stg_trt.tensor_spec import TensorSpec

Operation = Callable[[int], None]


class StepBuffers:
    """Static memory for every tensor at a border: rows of uncond, cond and skip, one per video each.

    A tensor that a segment both reads and writes has two sides, and each such segment flips them.
    """

    def __init__(
        self, specs: Sequence[TensorSpec], two_sided: frozenset[str], videos: int, device: torch.device
    ) -> None:
        self.videos = videos
        self._sides: dict[str, tuple[Tensor, ...]] = {}
        self._has_rows = {spec.name: spec.has_rows for spec in specs}
        for spec in specs:
            shape = spec.with_rows(len(GROUPS) * videos)
            sides = 2 if spec.name in two_sided else 1
            self._sides[spec.name] = tuple(
                torch.zeros(shape, dtype=spec.torch_dtype, device=device) for _ in range(sides)
            )
        self._keep = {
            perturbed: torch.tensor(
                [not (perturbed and group == "skip") for group in GROUPS for _ in range(videos)],
                device=device,
            )
            for perturbed in (False, True)
        }

    def view(self, name: str, groups: Sequence[str] = GROUPS, side: int = 0) -> Tensor:
        """The rows of neighbouring groups; the whole tensor where it is shared by all rows."""
        tensor = self._sides[name][side % len(self._sides[name])]
        return tensor[self._rows(groups)] if self._has_rows[name] else tensor

    def keep_attention(self, groups: Sequence[str], perturbed: bool) -> Tensor:
        """One bool per row, false for perturbed skip rows."""
        return self._keep[perturbed][self._rows(groups)]

    def has_rows(self, name: str) -> bool:
        """Whether the tensor has one entry per row."""
        return self._has_rows[name]

    def _rows(self, groups: Sequence[str]) -> slice:
        first, last = GROUPS.index(groups[0]), GROUPS.index(groups[-1])
        assert tuple(groups) == GROUPS[first : last + 1], groups
        return slice(first * self.videos, (last + 1) * self.videos)


def two_sided(
    segments: Sequence[Segment], borders: Callable[[Segment], Sequence[Sequence[str]]]
) -> frozenset[str]:
    """Names that some segment both reads and writes."""
    return frozenset(
        name for segment in segments for name in set(borders(segment)[0]) & set(borders(segment)[1])
    )


class StepRunner:
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
