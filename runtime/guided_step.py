"""The arithmetic around the engines, on the device: row fan-out before them, guidance and solver after.

This is the reference, in torch operations that can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

from stg_trt.guidance.combine import combine
from stg_trt.models.passes import Pass

from .state import StepState
from .step_key import StepKey


def fan_out_rows(state: StepState, passes: tuple[Pass, ...]) -> None:
    """latents -> scaled, cast and replicated to the rows of each pass, with the step's timestep."""
    scaled = state.latents * state.table.now("input_scale")
    for name in passes:
        state.buffers.view("latents", (name,)).copy_(scaled)
    timestep = state.buffers.view("timestep", passes)
    timestep.copy_(state.table.now("timestep").expand_as(timestep))


def guided_step(state: StepState, key: StepKey) -> None:
    """Combines the rows' predictions, steps the solver and advances the counter; all in float32."""
    table = state.table
    preds = {name: state.buffers.view("pred", (name,)) for name in key.passes}
    pred = combine(
        preds["cond"],
        preds.get("uncond"),
        preds.get("skip"),
        cfg_scale=table.now("cfg_scale") if "uncond" in preds else 1.0,
        stg_scale=table.now("stg_scale") if "skip" in preds else 0.0,
        rescale=table.now("rescale") if key.rescaled else 0.0,
        cfg_zero_star=key.cfg_zero_star,
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
