"""The eager float32 model of a build, run segment by segment with the rows of a step's plan.

Its blocks are loaded one at a time; they stay in memory if all of them fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.keep_flags import KEEP_FLAGS
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.passes import COND, Pass
from stg_trt.models.plan import SegmentRun
from stg_trt.models.segment import Segment
from stg_trt.models.workload import Workload
from stg_trt.system.machine_memory import available_bytes

from .memory import release_growth
from .pieces import pieces_of

State = dict[str, Tensor]
Change = Callable[[Segment, SegmentModule], object]
"""What is done to the module of a piece when it is loaded."""

_FLOAT32_BYTES = 4
# The most of the free memory that weights which stay may take.
_KEPT_SHARE = 0.25


class StreamedModel:
    """`passes` are those of all rows of a state; tensors with rows have one for each, computed or not."""

    def __init__(self, checkpoint: Checkpoint, workload: Workload, change: Change) -> None:
        self._checkpoint = checkpoint
        self._tensors = checkpoint.family.tensors(workload)
        self._change = change
        self._kept: dict[Segment, SegmentModule] = {}
        self._made: set[str] = set()
        weights = checkpoint.load_transformer((), ends=False).state_dict().values()
        experts = len(checkpoint.family.transformers)
        needed = _FLOAT32_BYTES * experts * sum(weight.numel() for weight in weights)
        self._keeps = needed < _KEPT_SHARE * available_bytes()

    @torch.no_grad()
    def run(self, run: SegmentRun, passes: Sequence[Pass], states: Sequence[State]) -> None:
        """Runs a segment on each state, in place, as the engines do."""
        for state in states:
            self._fork(run, passes, state)
        rows = torch.tensor([passes.index(one) for one in run.passes if one not in run.bypassed])
        for piece in pieces_of(run.segment) if len(rows) else ():
            module = self._module(piece)
            for state in states:
                inputs = [self._input(name, run, passes, rows, state) for name in module.inputs]
                for name, result in zip(module.outputs, module(*inputs), strict=True):
                    state[name] = _with_rows(state.get(name), result, rows, len(passes))
                    self._made.add(name)

    def _module(self, piece: Segment) -> SegmentModule:
        """The piece in float32; with no other one in memory where they do not all fit."""
        if piece in self._kept:
            return self._kept[piece]
        release_growth()
        transformer = self._checkpoint.load_transformer(piece.blocks, piece.expert, ends=piece.has_ends)
        module = self._checkpoint.family.module(transformer, piece, expand_masks=False).eval()
        self._change(piece, module)
        if self._keeps:
            self._kept[piece] = module
        return module

    def _fork(self, run: SegmentRun, passes: Sequence[Pass], state: State) -> None:
        """The rows of forks start as cond's, in all that the model has made; its inputs have them already."""
        cond = passes.index(COND)
        for row in map(passes.index, run.forks):
            for name in self._made & state.keys():
                state[name][row] = state[name][cond]

    def _input(
        self, name: str, run: SegmentRun, passes: Sequence[Pass], rows: Tensor, state: State
    ) -> Tensor:
        computed = [passes[row] for row in rows]
        if name in KEEP_FLAGS:
            return torch.tensor([run.keeps(name, one) for one in computed])
        return state[name][rows] if self._has_rows(name) else state[name]

    def _has_rows(self, name: str) -> bool:
        return self._tensors[name].row_axis == 0


def unchanged(piece: Segment, module: SegmentModule) -> None:
    """The model as its weights are."""


def _with_rows(before: Tensor | None, result: Tensor, rows: Tensor, count: int) -> Tensor:
    """`result` in its rows of `count`; the others stay as they were."""
    changed = result.new_zeros(count, *result.shape[1:]) if before is None else before.clone()
    changed[rows] = result
    return changed
