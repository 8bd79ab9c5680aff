"""The arithmetic around the engines, on the device: row fan-out before them, guidance and solver after.

This is the reference, in torch operations that can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stg_trt.guidance import combined
from stg_trt.step_runner import StepBuffers
from stg_trt.step_table import StepTable


@dataclass
class StepState:
    """Static memory of a run: rows at the engines' borders, latents in float32, and the step table.

    `history` holds every prediction so far and the noise that the solver adds, as the table says; it is
    None for solvers that need only the last prediction.
    """

    buffers: StepBuffers
    table: StepTable
    latents: Tensor
    initial: Tensor
    history: Tensor | None

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


def fan_out_rows(state: StepState, passes: tuple[str, ...]) -> None:
    """latents -> scaled, cast and replicated to the rows of each pass, with the step's timestep."""
    scaled = state.latents * state.table.now("input_scale")
    for group in passes:
        state.buffers.view("latents", (group,)).copy_(scaled)
    timestep = state.buffers.view("timestep", passes)
    timestep.copy_(state.table.now("timestep").expand_as(timestep))


def guided_step(
    state: StepState, passes: tuple[str, ...], *, rescaled: bool, two_term: bool, cfg_zero_star: bool
) -> None:
    """Combines the rows' predictions, steps the solver and advances the counter; all in float32."""
    table = state.table
    preds = {group: state.buffers.view("pred", (group,)).float() for group in passes}
    pred = combined(
        preds["cond"],
        preds.get("uncond"),
        preds.get("skip"),
        cfg_scale=table.now("cfg_scale"),
        stg_scale=table.now("stg_scale"),
        rescale=table.now("rescale") if rescaled else None,
        cfg_zero_star=cfg_zero_star,
    )
    if state.history is not None:
        state.history.index_copy_(0, table.counter, pred.unsqueeze(0))
    if two_term:
        stepped = state.latents * table.now("latents_factor") + pred * table.now("pred_factor")
    else:
        assert state.history is not None
        initial, factors = table.history_now()
        weighted = torch.tensordot(factors, state.history, dims=1)
        stepped = state.initial * initial + weighted
    state.latents.copy_(stepped)
    table.advance()
