"""A run's static memory: rows at the engines' borders, and each stream's latents, history and step table.

All of it is allocated here, before the first step, at addresses that engines and captured graphs keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.image import CleanLatents, Places
from stg_trt.models.passes import most_groups
from stg_trt.models.segment import Segment
from stg_trt.models.stream import VIDEO, Stream
from stg_trt.models.tensor_spec import TensorSpec, index_of
from stg_trt.runtime.table import StepTable

from .clean_latents import CleanMemory

Borders = Callable[[Segment], Sequence[Sequence[str]]]
"""Names of a segment's inputs and outputs."""


# Uncond and cond.
_PLAIN_GROUPS = 2


class StepBuffers:
    """Static memory for every tensor at a border, in row groups: one row per video for each pass of a step.

    A `ping_pong` tensor is read and written by the same segment, so it is two, which take turns. `unforked`
    ones have no rows of skip passes. Of those that are made for each expert before the first step, there are
    as many as `experts` says.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        ping_pong: frozenset[str],
        videos: int,
        device: torch.device,
        groups: int = 3,
        unforked: frozenset[str] = frozenset(),
        experts: Mapping[str, int] | None = None,
    ) -> None:
        self.videos = videos
        self.groups = groups
        self._device = device
        self._tensors: dict[str, tuple[Tensor, ...]] = {}
        self._has_rows = {spec.name: spec.has_rows for spec in specs}
        self._experts = dict(experts or {})
        for spec in specs:
            shape = spec.with_rows((_PLAIN_GROUPS if spec.name in unforked else groups) * videos)
            count = 2 if spec.name in ping_pong else self._experts.get(spec.name, 1)
            self._tensors[spec.name] = tuple(
                torch.zeros(shape, dtype=spec.torch_dtype, device=device) for _ in range(count)
            )

    def view(self, name: str, groups: range | None = None, turn: int = 0) -> Tensor:
        """The rows of neighbouring groups after `turn` rewrites, or of all; a shared tensor is whole."""
        tensor = self._tensors[name][turn % len(self._tensors[name])]
        if groups is None or not self._has_rows[name]:
            return tensor
        assert 0 <= groups.start < groups.stop <= self.groups, groups
        return tensor[groups.start * self.videos : groups.stop * self.videos]

    def first_turns(self, expert: int) -> dict[str, int]:
        """The turns that a step of an expert starts from: those of the tensors that were made for it."""
        return dict.fromkeys(self._experts, expert)

    def flags(self, kept: Sequence[bool]) -> Tensor:
        """A bool per row, from one per row group: false for the perturbed."""
        return torch.tensor([keep for keep in kept for _ in range(self.videos)], device=self._device)

    def index(self, groups: Sequence[int]) -> Tensor:
        """The row that each row reads, from the row group that each group reads."""
        rows = [group * self.videos + video for group in groups for video in range(self.videos)]
        return torch.tensor(rows, device=self._device)

    def has_rows(self, name: str) -> bool:
        """Whether the tensor has one entry per row."""
        return self._has_rows[name]


def find_ping_pong(segments: Sequence[Segment], borders: Borders) -> frozenset[str]:
    """Names that some segment both reads and writes."""
    return frozenset(
        name for segment in segments for name in set(borders(segment)[0]) & set(borders(segment)[1])
    )


def find_unforked(segments: Sequence[Segment], borders: Borders) -> frozenset[str]:
    """Names that the front writes and others read by an index, so that no skip pass has rows there."""
    read = {name for segment in segments for name in borders(segment)[0]}
    made = {name for segment in segments if segment.front for name in borders(segment)[1]}
    return frozenset(name for name in made if index_of(name) in read)


@dataclass(frozen=True)
class RunSize:
    """The sizes of a run's memory: videos at once, row groups, steps, the solver's history with its noise.

    `frames` is how many weights a pass has in a step.
    """

    videos: int
    steps: int
    single_step: bool
    noises: int
    groups: int = 3
    frames: int = 1

    @classmethod
    def of(cls, latents: Tensor, guidance: Guidance, solver: SolverTable) -> RunSize:
        """The size of a run from latents (videos, ...)."""
        steps = len(guidance.cfg_scale)
        noises = len(solver.used_draws(steps))
        groups = most_groups(guidance.most_skips, guidance.isolates)
        single_step = None not in solver.single_step
        return cls(len(latents), steps, single_step, noises, groups, guidance.frames)


@dataclass(frozen=True)
class Snapshot:
    """A stream between two steps: latents (videos, ...), the next step, and the predictions so far."""

    latents: Tensor
    counter: Tensor
    preds: Tensor | None


@dataclass
class StepState:
    """Static memory of a stream: its latents in float32, its step table, and the engines' rows that it uses.

    `history` holds every prediction so far and the noise that the solver adds, as the table says; it is
    None for solvers that need only the last prediction. `clean` is the memory of latents that are given, None
    before a run that has some.
    """

    buffers: StepBuffers
    table: StepTable
    latents: Tensor
    initial: Tensor
    history: Tensor | None
    stream: Stream = VIDEO
    clean: CleanMemory | None = None

    @classmethod
    def allocate(
        cls, buffers: StepBuffers, latents_shape: Sequence[int], size: RunSize, stream: Stream = VIDEO
    ) -> StepState:
        """For runs of a size or less, whose latents (videos, ...) have a shape; on the buffers' device."""
        device = buffers.view(stream.latents).device
        table = StepTable(size.steps, buffers.groups, device, size.noises, size.frames)

        def zeros(*leading: int) -> Tensor:
            return torch.zeros(*leading, *latents_shape, device=device)

        history = None if size.single_step else zeros(table.slots)
        return cls(buffers, table, zeros(), zeros(), history, stream)

    def input_rows(self, groups: range) -> Tensor:
        """The rows of its latents at the engines' border."""
        return self.buffers.view(self.stream.latents, groups)

    def pred_rows(self, groups: range) -> Tensor:
        """The rows of its predictions."""
        return self.buffers.view(self.stream.pred, groups)

    def fits(self, size: RunSize) -> bool:
        """Whether this memory is large enough for a run."""
        return (
            self.buffers.videos == size.videos
            and self.buffers.groups >= size.groups
            and self.table.capacity >= size.steps
            and self.table.frames >= size.frames
            and (size.single_step or self.history is not None)
            and self.table.slots - self.table.capacity >= size.noises
        )

    def start(self, latents: Tensor) -> None:
        """Writes the latents that a run starts from; no prediction of the last run can be read after it."""
        self.initial.copy_(latents)
        self.latents.copy_(latents)
        if self.history is not None:
            self._preds.zero_()

    def hold(self, clean: CleanLatents, *, single_step: bool) -> None:
        """Writes the latents that are given in a run; their memory stays for later runs."""
        if self.clean is None:
            self.clean = CleanMemory(self.latents.shape, self.latents.device)
        self.clean.load(clean, single_step=single_step)

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


@dataclass
class RunState:
    """Static memory of a run: the engines' rows, and a state for each of the model's streams.

    `positions` are the frame rate and the places of the position tables in the buffers, None before they are
    written.
    """

    buffers: StepBuffers
    streams: tuple[StepState, ...]
    positions: tuple[float, Places] | None = None

    @property
    def video(self) -> StepState:
        """The first stream, whose counter says for all which step is next."""
        return self.streams[0]

    def fits(self, size: RunSize) -> bool:
        """Whether this memory is large enough for a run."""
        return all(state.fits(size) for state in self.streams)

    def load(self, guidance: Guidance, solver: SolverTable) -> None:
        """Writes every stream's tables of a run."""
        for state, own in zip(self.streams, guidance.streams, strict=True):
            state.table.load(own, solver)

    def go_to(self, step: int) -> None:
        """Makes `step` the next one of every stream."""
        for state in self.streams:
            state.table.go_to(step)

    def snapshot(self) -> tuple[Snapshot, ...]:
        """Of every stream."""
        return tuple(state.snapshot() for state in self.streams)

    def restore(self, saved: Sequence[Snapshot]) -> None:
        """Back to a snapshot."""
        for state, of_stream in zip(self.streams, saved, strict=True):
            state.restore(of_stream)
