"""States and tables of a step, without engines."""

from __future__ import annotations

import torch

from stg_trt.families.base import keep_attention_spec
from stg_trt.guidance import Guidance
from stg_trt.guided_step import StepState
from stg_trt.solver import SolverTable
from stg_trt.step_runner import StepBuffers
from stg_trt.step_table import StepTable
from stg_trt.tensor_spec import ROWS, TensorSpec

STEPS = 6


def state_of(
    videos: int, length: int, dtype: str, device: torch.device, multistep: bool = False
) -> StepState:
    """Random latents and predictions in float32 and `dtype`."""
    specs = [
        TensorSpec("latents", dtype, (ROWS, length)),
        TensorSpec("timestep", "float32", (ROWS,)),
        TensorSpec("pred", dtype, (ROWS, length)),
        keep_attention_spec(),
    ]
    generator = torch.Generator().manual_seed(length)
    state = StepState(
        buffers=StepBuffers(specs, frozenset(), videos, device),
        table=StepTable(8, device),
        latents=torch.zeros(videos, length, device=device),
        initial=torch.zeros(videos, length, device=device),
        history=torch.zeros(8, videos, length, device=device) if multistep else None,
    )
    state.start(torch.randn(videos, length, generator=generator).to(device))
    state.buffers.view("pred").copy_(torch.randn(3 * videos, length, generator=generator) + 1)
    return state


def tables(multistep: bool = False) -> tuple[Guidance, SolverTable]:
    """Full guidance with rescale; flow Euler, or UniPC."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    flow = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    solver = SolverTable.from_scheduler(flow if multistep else FlowMatchEulerDiscreteScheduler(), STEPS)
    guidance = Guidance.for_steps(
        [t / 1000 for t in solver.timesteps], guidance_scale=3.0, stg_scale=1.0, rescale=0.7, stg_blocks=[0]
    )
    return guidance, solver
