"""A run's static memory: rows at the engines' borders, latents, history, and the table of per-step values.

All of it is allocated here, before the first step, at addresses that engines and captured graphs keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.passes import PASSES, Pass
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import TensorSpec
from stg_trt.runtime.table import StepTable


class StepBuffers:
    """Static memory for every tensor at a border: rows of uncond, cond and skip, one per video each.

    A `ping_pong` tensor is read and written by the same segment, so it is two, which take turns.
    """

    def __init__(
        self, specs: Sequence[TensorSpec], ping_pong: frozenset[str], videos: int, device: torch.device
    ) -> None:
        self.videos = videos
        self._tensors: dict[str, tuple[Tensor, ...]] = {}
        self._has_rows = {spec.name: spec.has_rows for spec in specs}
        for spec in specs:
            shape = spec.with_rows(len(PASSES) * videos)
            count = 2 if spec.name in ping_pong else 1
            self._tensors[spec.name] = tuple(
                torch.zeros(shape, dtype=spec.torch_dtype, device=device) for _ in range(count)
            )
        self._keep = {
            perturbed: torch.tensor(
                [not (perturbed and name == "skip") for name in PASSES for _ in range(videos)],
                device=device,
            )
            for perturbed in (False, True)
        }

    def view(self, name: str, passes: Sequence[Pass] = PASSES, turn: int = 0) -> Tensor:
        """The rows of neighbouring passes after `turn` rewrites; all of a tensor that the rows share."""
        tensor = self._tensors[name][turn % len(self._tensors[name])]
        return tensor[self._rows(passes)] if self._has_rows[name] else tensor

    def keep_attention(self, passes: Sequence[Pass], perturbed: bool) -> Tensor:
        """One bool per row, false for perturbed skip rows."""
        return self._keep[perturbed][self._rows(passes)]

    def has_rows(self, name: str) -> bool:
        """Whether the tensor has one entry per row."""
        return self._has_rows[name]

    def _rows(self, passes: Sequence[Pass]) -> slice:
        first, last = PASSES.index(passes[0]), PASSES.index(passes[-1])
        assert tuple(passes) == PASSES[first : last + 1], passes
        return slice(first * self.videos, (last + 1) * self.videos)


def find_ping_pong(
    segments: Sequence[Segment], borders: Callable[[Segment], Sequence[Sequence[str]]]
) -> frozenset[str]:
    """Names that some segment both reads and writes."""
    return frozenset(
        name for segment in segments for name in set(borders(segment)[0]) & set(borders(segment)[1])
    )


@dataclass(frozen=True)
class RunSize:
    """The sizes of a run's memory: videos at once, steps, and the solver's history with its noise."""

    videos: int
    steps: int
    single_step: bool
    noises: int

    @classmethod
    def of(cls, latents: Tensor, guidance: Guidance, solver: SolverTable) -> RunSize:
        """The size of a run from latents (videos, ...)."""
        steps = len(guidance.cfg_scale)
        return cls(len(latents), steps, None not in solver.single_step, len(solver.used_draws(steps)))


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps: latents (videos, ...), the next step, and the predictions so far."""

    latents: Tensor
    counter: Tensor
    preds: Tensor | None


@dataclass
class StepState:
    """Static memory of a run: rows at the engines' borders, latents in float32, and the step table.

    `history` holds every prediction so far and the noise that the solver adds, as the table says; it is
    None for solvers that need only the last prediction. `frame_rate` is that of the position tables in the
    buffers, None before they are written.
    """

    buffers: StepBuffers
    table: StepTable
    latents: Tensor
    initial: Tensor
    history: Tensor | None
    frame_rate: float | None = None

    @classmethod
    def allocate(cls, buffers: StepBuffers, latents_shape: Sequence[int], size: RunSize) -> StepState:
        """For runs of a size or less, whose latents (videos, ...) have a shape; on the buffers' device."""
        device = buffers.view("latents").device
        table = StepTable(size.steps, device, size.noises)

        def zeros(*leading: int) -> Tensor:
            return torch.zeros(*leading, *latents_shape, device=device)

        return cls(buffers, table, zeros(), zeros(), None if size.single_step else zeros(table.slots))

    def fits(self, size: RunSize) -> bool:
        """Whether this memory is large enough for a run."""
        return (
            self.buffers.videos == size.videos
            and self.table.capacity >= size.steps
            and (size.single_step or self.history is not None)
            and self.table.slots - self.table.capacity >= size.noises
        )

    def start(self, latents: Tensor) -> None:
        """Writes the latents that a run starts from; no prediction of the last run can be read after it."""
        self.initial.copy_(latents)
        self.latents.copy_(latents)
        if self.history is not None:
            self._preds.zero_()

    def add_noise(self, noise: Tensor) -> None:
        """Writes the noise that the solver adds in a run, (draws, videos, ...)."""
        assert self.history is not None
        self.history[self.table.capacity :][: len(noise)].copy_(noise)

    def snapshot(self) -> Snapshot:
        """Copies of all that a step changes, except rows, which every step writes before it reads them."""
        preds = None if self.history is None else self._preds.clone()
        return Snapshot(self.latents.clone(), self.table.counter.clone(), preds)

    def restore(self, saved: Snapshot) -> None:
        """Back to a snapshot."""
        self.latents.copy_(saved.latents)
        self.table.counter.copy_(saved.counter)
        if saved.preds is not None:
            self._preds.copy_(saved.preds)

    @property
    def _preds(self) -> Tensor:
        """The history without the noise, which no step changes."""
        assert self.history is not None
        return self.history[: self.table.capacity]
