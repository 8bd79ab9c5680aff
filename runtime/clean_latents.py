"""Latents that pictures give: what a step does to keep them, around the engines and the solver.

Torch operations on static memory, so that they can be captured in a step's graph. They run only in steps of
a picture's run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stg_trt.errors import InvalidRequest
from stg_trt.models.families.token_timesteps import TRAIN_TIMESTEPS
from stg_trt.models.image import CleanLatents

from .noise import Generators, draw

if TYPE_CHECKING:
    from .operations import Operation
    from .state import StepState
    from .step_key import StepKey

# As diffusers compares strengths and noise levels.
_EPSILON = 1e-6


class CleanMemory:
    """Static memory of the given latents of a run, and their strength, both in the layout of the latents."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self.replacement, self.kept, self.noise = (torch.zeros(*shape, device=device) for _ in range(3))
        self.strength = torch.zeros(*shape[1:], device=device)
        self.stays = torch.zeros(*shape[1:], dtype=torch.bool, device=device)
        self._noise_scale = 0.0

    def load(self, clean: CleanLatents, *, single_step: bool) -> None:
        """Writes those of a run; raises InvalidRequest for a strength that the solver cannot honour."""
        if not single_step and bool(((clean.strength > 0) & (clean.strength < 1)).any()):
            raise InvalidRequest(
                "strength: expected 0 or 1 for a scheduler that continues from earlier steps, got one "
                "between: use a flow Euler scheduler"
            )
        if clean.replaced_by is not None:
            self.replacement.copy_(clean.replaced_by)
        self.strength.copy_(clean.strength.expand_as(self.strength))
        self._noise_scale = clean.noise_scale

    def draw(self, generator: Generators | None, timestep: float) -> None:
        """The noise of a step at a timestep, drawn as diffusers draws it: of all latents."""
        noise = draw(tuple(self.noise.shape), generator)
        self.noise.copy_(self._noise_scale * noise * (timestep / TRAIN_TIMESTEPS) ** 2)


@dataclass(frozen=True)
class CleanOperations:
    """What a step does for latents that are given, beside what it does for all."""

    before_fan_out: Operation
    before_engines: Operation
    after_engines: Operation
    after_solver: Operation


def clean_latents(state: StepState, key: StepKey) -> CleanOperations:
    """The operations of a step that treats its given latents as `key.clean` says."""
    memory = state.clean
    assert memory is not None

    def note(stream: int) -> None:
        # Given latents stay as they are while the noise level is above what their strength leaves.
        level = state.table.now("timestep") / TRAIN_TIMESTEPS
        memory.stays.copy_(level - _EPSILON >= 1 - memory.strength)
        memory.kept.copy_(state.latents)

    def add_noise(stream: int) -> None:
        anew = state.initial + memory.noise
        state.latents.copy_(torch.where(memory.strength > 1 - _EPSILON, anew, state.latents))
        note(stream)

    def replace(stream: int) -> None:
        memory.kept.copy_(state.latents)
        state.latents.copy_(torch.where(memory.strength > 0, memory.replacement, state.latents))

    def still(stream: int) -> None:
        # Their clean latents x0 = x - sigma*v are what they are now, which counts in the deviation of x0.
        state.pred_rows(key.groups).masked_fill_(memory.stays, 0)

    def put_all_back(stream: int) -> None:
        state.latents.copy_(memory.kept)

    def put_back(stream: int) -> None:
        # The solver has moved them with the others.
        state.latents.copy_(torch.where(memory.stays, memory.kept, state.latents))

    if key.clean == "replaced":
        return CleanOperations(replace, put_all_back, _nothing, _nothing)
    first = add_noise if key.clean == "noised" else note
    return CleanOperations(first, _nothing, still if key.rescales_x0 else _nothing, put_back)


def _nothing(stream: int) -> None:
    return
