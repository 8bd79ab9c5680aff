"""From a call's arguments to its work: a build, and each step's guidance and solver coefficients."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from torch import Tensor

from stg_trt.engines.store import Build, EngineRequest, EngineStore, find_possible
from stg_trt.errors import InvalidRequest
from stg_trt.guidance.options import GuidanceOptions
from stg_trt.guidance.resolved import ResolvedGuidance
from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.custom_steps import CustomSteps
from stg_trt.models.defaults import Defaults
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.image import Images
from stg_trt.models.perturbation import check_blocks
from stg_trt.models.workload import Workload, chosen_frame_rate
from stg_trt.system.callers import level_outside

from .arguments import SoundArguments
from .noise import Generators
from .pictures import GivenPictures
from .prompts import Prompts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A call's arguments up to its latents; None is the default of the family or the engines.

    `steps` win over `num_inference_steps`, as in diffusers.
    """

    sizes: EngineRequest
    prompts: Prompts
    pictures: GivenPictures
    guidance: GuidanceOptions
    num_inference_steps: int | None
    frame_rate: float | None
    generator: Generators | None
    latents: Tensor | None
    max_sequence_length: int | None
    steps: CustomSteps | None
    sound: SoundArguments


@dataclass(frozen=True)
class _Steps:
    """How many steps a scheduler is asked for, or which; the first and the last of them may be left out."""

    count: int
    custom: CustomSteps | None
    drop_first: int = 0
    drop_last: int = 0

    @classmethod
    def of(cls, request: Request, defaults: Defaults) -> _Steps:
        """Those that the call lists, else its number of them, else the preset's, else the family's.

        What a preset leaves out belongs to a number of steps, not to a list.
        """
        preset, count = request.guidance.published, request.num_inference_steps
        if request.steps is not None:
            return cls(len(request.steps.values), request.steps)
        if preset is None:
            usual = cls(defaults.num_inference_steps, defaults.steps)
        else:
            usual = cls(preset.num_inference_steps, preset.custom, preset.drop_first, preset.drop_last)
        if count is None:
            return usual
        if count < 1:
            raise InvalidRequest(f"num_inference_steps: expected at least 1, got {count}: use {usual.count}")
        return replace(usual, count=count, custom=None)

    def set_on(self, scheduler: Any, family: ModelFamily, workload: Workload) -> None:
        """Sets the scheduler's timesteps; raises InvalidRequest for those that it cannot take."""
        try:
            if self.custom is None:
                family.set_timesteps(scheduler, self.count, workload)
            else:
                family.set_custom_steps(scheduler, self.custom, workload)
        except InvalidRequest:
            raise
        except (ValueError, AssertionError) as error:
            raise InvalidRequest(
                f"scheduler: expected steps that {type(scheduler).__name__} can take, got {self} ({error}): "
                "change the steps or the scheduler"
            ) from error
        if self.drop_first:
            scheduler.set_begin_index(self.drop_first)

    def table(self, scheduler: Any, family: ModelFamily) -> SolverTable:
        """Of a scheduler on which they are set; raises InvalidRequest for steps that it cannot take."""
        try:
            return SolverTable.from_scheduler(scheduler, per_token=family.steps_per_token(scheduler))
        except AssertionError as error:  # UniPC's, asked for as many steps as it was trained with.
            raise InvalidRequest(
                f"scheduler: expected steps that {type(scheduler).__name__} can take, got {self}: use fewer"
            ) from error

    def __str__(self) -> str:
        return f"{self.count} steps" if self.custom is None else f"{self.custom.name} {[*self.custom.values]}"


@dataclass(frozen=True)
class Schedule:
    """The build that a call runs, and its steps; a preset may leave out the last ones of the solver.

    `frame_rate` is what the model is told.
    """

    build: Build
    guidance: Guidance
    solver: SolverTable
    frame_rate: float

    @property
    def workload(self) -> Workload:
        """The sizes of the build."""
        return self.build.manifest.workload


def schedule_steps(
    request: Request, images: Images | None, store: EngineStore, family: ModelFamily, scheduler: Any
) -> Schedule:
    """Finds the build and works out the tables; sets the scheduler's timesteps.

    Raises InvalidRequest for options that cannot be used and EngineRejected if no build fits them.
    """
    build = find_possible(store, request.sizes, family)
    workload = build.manifest.workload
    length, room = request.max_sequence_length, family.prompt_tokens(workload)
    if length not in (None, room):
        raise InvalidRequest(
            f"max_sequence_length: expected {room}, the text tokens of these engines, got {length}: leave it "
            f"out, or build with --text-length {workload.text_length + length - room}"
        )
    steps = _Steps.of(request, family.defaults)
    steps.set_on(scheduler, family, workload)
    _log.info("%s: %s", type(scheduler).__name__, steps)
    solver = steps.table(scheduler, family)
    taken = len(solver.timesteps) - steps.drop_last
    options = request.guidance.resolve(
        ResolvedGuidance.of_family(family.defaults, build.manifest.stg_mode, build.manifest.skips),
        family.takes_true_cfg,
    )
    # diffusers' pipelines take 1 for such a model, and calls are copied with it.
    if options.embedded_guidance not in (None, 1.0) and family.embedded_guidance is None:
        raise InvalidRequest(
            f"guidance_scale: expected none for this {family.name}, which takes no guidance as an input, got "
            f"{options.embedded_guidance}: use true_cfg_scale"
        )
    _check_second_scale(options, family)
    experts = family.experts(solver.timesteps[:taken], scheduler.config.num_train_timesteps)
    _, frames, *_ = family.latent_shape(workload)
    guidance = Guidance.for_steps(
        solver.noise_levels[:taken],
        options,
        solver.timesteps[:taken],
        frames,
        experts,
        family.rescale_space,
    )
    rate = chosen_frame_rate(request.frame_rate, family.defaults.frame_rate)
    for perturbation in guidance.perturbations:
        check_blocks(perturbation.blocks, family.num_blocks)
    # The steps belong to the sizes of this build; what they perturb may need another one.
    fitting = replace(
        request.sizes,
        height=workload.height,
        width=workload.width,
        num_frames=workload.num_frames,
        condition_frames=0 if images is None else family.condition_frames(images, workload),
        audio_num_frames=family.audio_num_frames(workload.num_frames, rate),
        perturbations=guidance.perturbations,
        skips=guidance.most_skips,
    )
    if fitting.rejects(build.manifest) is not None:
        build = store.find(fitting)
    return Schedule(build, guidance, solver, rate / request.sound.motion_speed)


def _check_second_scale(options: ResolvedGuidance, family: ModelFamily) -> None:
    """Raises InvalidRequest without a second expert; warns where diffusers makes nothing of the scale."""
    first, second = options.guidance_scale, options.guidance_scale_2
    if second is None:
        return
    if len(family.transformers) == 1:
        raise InvalidRequest(
            f"guidance_scale_2: expected none for this {family.name}, whose model_index.json has no "
            f"boundary_ratio, got {second}: use guidance_scale"
        )
    if isinstance(first, Real) and float(first) <= 1:
        warnings.warn(
            f"guidance_scale_2: expected guidance_scale above 1 beside it, got {first}: neither expert has "
            "CFG now, as in diffusers; for CFG on some of the steps give guidance_scale one value per step",
            stacklevel=level_outside(),
        )
