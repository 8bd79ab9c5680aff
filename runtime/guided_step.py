"""The arithmetic around the engines, on the device: row fan-out before them, guidance and solver after.

This is the reference, in torch operations that can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

from stg_trt.guidance.combine import NoisyLatents, combine

from .state import StepState
from .step_key import StepKey


def fan_out_rows(state: StepState, groups: range) -> None:
    """latents -> scaled, cast and replicated to each row group, with the step's timestep."""
    scaled = state.latents * state.table.now("input_scale")
    for rows in state.input_rows(groups).split(len(scaled)):
        rows.copy_(scaled)
    timestep = state.buffers.view("timestep", groups)
    timestep.copy_(state.table.now("timestep").expand_as(timestep))


def guided_step(state: StepState, key: StepKey) -> None:
    """Sums the passes' predictions, steps the solver and advances the counter; all in float32."""
    table = state.table
    pred = combine(
        state.pred_rows(key.groups).unflatten(0, (len(key.passes), -1)),
        table.weights_now(key.groups),
        key.cond,
        rescale=table.now("rescale") if key.rescaled else 0.0,
        zero_star=key.zero_star,
        noisy=NoisyLatents(state.latents, table.now("noise_level")) if key.rescales_x0 else None,
    )
    if state.history is not None:
        state.history.index_copy_(0, table.counter, pred.unsqueeze(0))
    if key.single_step:
        stepped = state.latents * table.now("latents_factor") + pred * table.now("pred_factor")
    else:
        assert state.history is not None
        initial, factors = table.history_now()
        weighted = torch.tensordot(factors, state.history, dims=1)
        stepped = state.initial * initial + weighted
    state.latents.copy_(stepped)
    table.advance()
