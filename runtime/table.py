"""The values of every step of a run, on the device, and the counter that says which step is next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.passes import row_groups

_SCALARS = ("timestep", "input_scale", "rescale", "noise_level", "latents_factor", "pred_factor")


class StepTable:
    """Per-step values for up to `capacity` steps; `counter`, on the device too, is the step to run next.

    So N steps are N runs of the same work, with nothing copied from the host in between, and one captured
    graph serves them all. `weights` (capacity, groups, frames) are those of a step's row groups in the sum of
    their predictions. A single step is x' = latents_factor*x + pred_factor*pred; the others use the rows
    x' = initial_factor*x_T + sum_j history_factors_j*history_j, whose history is `slots` tensors: the
    predictions of `capacity` steps, then `noises` of noise.
    """

    def __init__(
        self, capacity: int, groups: int, device: torch.device, noises: int = 0, frames: int = 1
    ) -> None:
        self.capacity = capacity
        self.frames = frames
        self.slots = capacity + noises
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.weights = torch.zeros(capacity, groups, frames, device=device)
        self._scalars = torch.zeros(len(_SCALARS), capacity, device=device)
        self._initial_factor = torch.zeros(capacity, device=device)
        self._history_factors = torch.zeros(capacity, self.slots, device=device)

    def load(self, guidance: Guidance, solver: SolverTable) -> None:
        """Writes the tables of a run and starts at step 0."""
        steps = len(guidance.cfg_scale)
        pairs = [pair or (0.0, 0.0) for pair in solver.single_step[:steps]]
        columns: Sequence[Sequence[float]] = (
            solver.timesteps[:steps],
            solver.input_scale[:steps],
            guidance.rescale,
            solver.noise_levels[:steps],
            [a for a, _ in pairs],
            [b for _, b in pairs],
        )
        self._scalars[:, :steps].copy_(torch.tensor(columns))
        self.weights.copy_(self._weights_of(guidance))
        self._initial_factor[:steps].copy_(solver.a[:steps])
        self._history_factors[:steps, :steps].copy_(solver.b[:steps, :steps])
        used = solver.used_draws(steps)
        of_noise = self._history_factors[:steps, self.capacity :]
        of_noise[:, : len(used)].copy_(solver.c[:steps, list(used)])
        of_noise[:, len(used) :].zero_()
        self.go_to(0)

    def now(self, name: str) -> Tensor:
        """A value of the current step, of shape (1,)."""
        return self._scalars[_SCALARS.index(name)].index_select(0, self.counter)

    def history_now(self) -> tuple[Tensor, Tensor]:
        """The current step's factors of x_T (1,) and of the history (slots,)."""
        initial = self._initial_factor.index_select(0, self.counter)
        return initial, self._history_factors.index_select(0, self.counter)[0]

    def weights_now(self, groups: range) -> Tensor:
        """The current step's weights (groups, frames) of neighbouring row groups."""
        return self.weights.index_select(0, self.counter)[0, groups.start : groups.stop]

    def _weights_of(self, guidance: Guidance) -> Tensor:
        weights = torch.zeros(self.weights.shape)
        for step in range(guidance.num_steps):
            groups = row_groups(guidance.passes(step))
            of_frames = [guidance.weights(step, frame) for frame in range(guidance.frames)]
            weights[step, groups.start : groups.stop] = torch.tensor(of_frames).T
        return weights

    def device_values(self, *names: str) -> dict[str, Tensor]:
        """The tables that a kernel reads, by name, at their fixed addresses."""
        tables = {
            **dict(zip(_SCALARS, self._scalars, strict=True)),
            "initial_factor": self._initial_factor,
            "history_factors": self._history_factors,
        }
        return {name: tables[name] for name in names}

    def go_to(self, step: int) -> None:
        """Makes `step` the next one."""
        self.counter.fill_(step)

    def advance(self) -> None:
        """To the next step."""
        self.counter.add_(1)
