"""States and tables of a step, without engines."""

from __future__ import annotations

import torch

from stg_trt.guidance.resolved import ResolvedGuidance
from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.families.keep_flags import keep_attention_spec
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.runtime.state import RunSize, StepBuffers, StepState

STEPS = 6
# One that needs only the last prediction, one that needs all, and one that adds noise.
SOLVERS = ("euler", "unipc", "cogvideox_dpm")


def state_of(
    videos: int, length: int, dtype: str, device: torch.device, solver: str = "euler", groups: int = 3
) -> StepState:
    """Random latents, predictions and noise in float32 and `dtype`."""
    specs = [
        TensorSpec("latents", dtype, (ROWS, length)),
        TensorSpec("timestep", "float32", (ROWS,)),
        TensorSpec("pred", dtype, (ROWS, length)),
        keep_attention_spec(),
    ]
    generator = torch.Generator().manual_seed(length)
    noises = STEPS if solver == "cogvideox_dpm" else 0
    size = RunSize(videos, steps=8, single_step=solver == "euler", noises=noises)
    state = StepState.allocate(
        StepBuffers(specs, frozenset(), videos, device, groups), (videos, length), size
    )
    if noises:
        state.add_noise(torch.randn(noises, videos, length, generator=generator))
    state.start(torch.randn(videos, length, generator=generator).to(device))
    state.buffers.view("pred").copy_(torch.randn(groups * videos, length, generator=generator) + 1)
    return state


def tables(
    solver_name: str = "euler", passes: tuple[str, ...] = ("uncond", "cond", "skip")
) -> tuple[Guidance, SolverTable]:
    """Guidance of these passes with rescale, and one of SOLVERS; every skip pass has a scale of its own."""
    from diffusers import CogVideoXDPMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    schedulers = {
        "euler": FlowMatchEulerDiscreteScheduler(),
        "unipc": UniPCMultistepScheduler(**flow),
        "cogvideox_dpm": CogVideoXDPMScheduler(
            prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
        ),
    }
    solver = SolverTable.from_scheduler(schedulers[solver_name], STEPS)
    skips = [name for name in passes if name not in ("uncond", "cond")]
    guidance = Guidance.for_steps(
        [t / 1000 for t in solver.timesteps],
        ResolvedGuidance(
            guidance_scale=3.0 if "uncond" in passes else 1.0,
            stg_scale={name: 1.0 + 0.5 * i for i, name in enumerate(skips)},
            rescale=0.7,
            stg_blocks={name: (i,) for i, name in enumerate(skips)},
        ),
    )
    return guidance, solver
