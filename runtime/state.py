"""A run's static memory: rows at the engines' borders, latents, history and the step table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stg_trt.models.plan import GROUPS
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import TensorSpec

from .table import StepTable


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

    def start(self, latents: Tensor) -> None:
        """Writes the latents that a run starts from; no prediction of the last run can be read after it."""
        self.initial.copy_(latents)
        self.latents.copy_(latents)
        if self.history is not None:
            self._preds.zero_()

    def add_noise(self, noise: Tensor) -> None:
        """Writes what the solver adds in a run, (draws, videos, ...)."""
        assert self.history is not None
        self.history[self.table.capacity :][: len(noise)].copy_(noise)

    def snapshot(self) -> tuple[Tensor, ...]:
        """What a step changes."""
        changed = (self.latents, self.table.counter, *([] if self.history is None else [self._preds]))
        return tuple(tensor.clone() for tensor in changed)

    def restore(self, saved: tuple[Tensor, ...]) -> None:
        """Back to a snapshot."""
        self.latents.copy_(saved[0])
        self.table.counter.copy_(saved[1])
        if self.history is not None:
            self._preds.copy_(saved[2])

    @property
    def _preds(self) -> Tensor:
        """The history without the noise, which no step changes."""
        assert self.history is not None
        return self.history[: self.table.capacity]
