"""From a call's arguments to its work: a build, and each step's guidance and solver coefficients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from stg_trt.engines.store import Build, EngineRequest, EngineStore, find_possible
from stg_trt.errors import InvalidRequest
from stg_trt.guidance.options import GuidanceOptions
from stg_trt.guidance.presets import Preset
from stg_trt.guidance.resolved import ResolvedGuidance
from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.perturbation import check_blocks
from stg_trt.models.workload import Workload

from .noise import Generators
from .prompts import Prompts


@dataclass(frozen=True)
class Request:
    """A call's arguments up to its latents; None is the default of the family or the engines."""

    sizes: EngineRequest
    prompts: Prompts
    guidance: GuidanceOptions
    num_inference_steps: int | None
    frame_rate: float | None
    generator: Generators | None
    latents: Tensor | None
    max_sequence_length: int | None = None


@dataclass(frozen=True)
class Schedule:
    """The build that a call runs, and its steps; a preset may leave out the last ones of the solver."""

    build: Build
    guidance: Guidance
    solver: SolverTable

    @property
    def workload(self) -> Workload:
        """The sizes of the build."""
        return self.build.manifest.workload


def schedule_steps(request: Request, store: EngineStore, family: ModelFamily, scheduler: Any) -> Schedule:
    """Finds the build and works out the tables; sets the scheduler's timesteps.

    Raises InvalidRequest for options that cannot be used and EngineRejected if no build fits them.
    """
    build = find_possible(store, request.sizes, family)
    workload, preset = build.manifest.workload, request.guidance.published
    if request.max_sequence_length not in (None, workload.text_length):
        raise InvalidRequest(
            f"max_sequence_length: expected {workload.text_length}, the text tokens of these engines, got "
            f"{request.max_sequence_length}: leave it out, or build with --text-length "
            f"{request.max_sequence_length}"
        )
    solver = _solve(scheduler, workload, family, request.num_inference_steps, preset)
    taken = len(solver.timesteps) - (preset.drop_last if preset else 0)
    options = request.guidance.resolve(
        ResolvedGuidance.of_family(family.defaults, build.manifest.perturbation), family.takes_true_cfg
    )
    if options.embedded_guidance is not None and family.embedded_guidance is None:
        raise InvalidRequest(
            f"guidance_scale: expected none for this {family.name}, which takes no guidance as an input, got "
            f"{options.embedded_guidance}: use true_cfg_scale"
        )
    guidance = Guidance.for_steps(solver.noise_levels[:taken], options, solver.timesteps[:taken])
    for perturbation in guidance.perturbations:
        check_blocks(perturbation.blocks, family.num_blocks)
    # The steps belong to the sizes of this build; what they perturb may need another one.
    fitting = replace(
        request.sizes,
        height=workload.height,
        width=workload.width,
        num_frames=workload.num_frames,
        perturbations=guidance.perturbations,
    )
    if fitting.rejects(build.manifest) is not None:
        build = store.find(fitting)
    return Schedule(build, guidance, solver)


def _solve(
    scheduler: Any, workload: Workload, family: ModelFamily, steps: int | None, preset: Preset | None
) -> SolverTable:
    """The solver's table; a preset says how many steps there are, and which of them come first."""
    usual = preset.num_inference_steps if preset else family.defaults.num_inference_steps
    steps = usual if steps is None else steps
    if steps < 1:
        raise InvalidRequest(f"num_inference_steps: expected at least 1, got {steps}: use {usual}")
    family.set_timesteps(scheduler, steps, workload)
    if preset and preset.drop_first:
        scheduler.set_begin_index(preset.drop_first)
    return SolverTable.from_scheduler(scheduler)
