"""A short guided run of an eager model over several prompts: the states that calibration measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.guidance.combine import NoisyLatents, combine
from stg_trt.guidance.resolved import ResolvedGuidance
from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.passes import COND, UNCOND, Pass, SkipBlocksByName, read_skips
from stg_trt.models.plan import SegmentRun, plan_step
from stg_trt.models.segment import Segment
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload

from .calibration_texts import Texts

if TYPE_CHECKING:
    from .streamed_model import State

Latents = Mapping[str, Tensor]
"""Of one video, by stream; (1, ...) in float32."""


@dataclass(frozen=True)
class RunOptions:
    """What is run: the model at one size, cut into segments, with the skip passes of a build."""

    checkpoint: Checkpoint
    workload: Workload
    segments: tuple[Segment, ...]
    stg_mode: str
    skips: SkipBlocksByName
    steps: int


class GuidedRun:
    """The family's own guidance and solver, from noise that depends on the prompt's place in the list."""

    def __init__(self, options: RunOptions, texts: Texts) -> None:
        self._options = options
        self._family = options.checkpoint.family
        self._texts = texts
        self.solver = _solver(options)
        self.guidance = _guidance(options, self.solver)
        self._constants: dict[tuple[int, tuple[Pass, ...]], State] = {}

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return self.guidance.num_steps

    def runs(self, step: int) -> Iterator[SegmentRun]:
        """The segments of a step in order; the projection of the text first, for all rows."""
        segments, expert = self._options.segments, self.guidance.expert(step)
        passes = self.guidance.passes(step)
        yield from (SegmentRun(one, passes) for one in segments if one.text and one.expert == expert)
        yield from plan_step(segments, passes, expert).runs

    def starts(self) -> list[Latents]:
        """The noise of every prompt, times the solver's scale."""
        tensors = self._family.tensors(self._options.workload)
        starts: list[Latents] = []
        for place in range(len(self._texts.conds)):
            generator = torch.Generator().manual_seed(place)
            shapes = {one.latents: tensors[one.latents].with_rows(1) for one in self._family.streams}
            noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
            starts.append({name: tensor * self.solver.noise_scale for name, tensor in noise.items()})
        return starts

    def states(self, step: int, every: Sequence[Latents]) -> list[State]:
        """What a step's first segments read: a row per pass, for each prompt's latents."""
        passes = self.guidance.passes(step)
        scale = self.solver.input_scale[step]
        return [
            {
                **self._constants_of(place, passes),
                **{name: (x * scale).repeat(len(passes), *[1] * (x.ndim - 1)) for name, x in latents.items()},
                "timestep": torch.full((len(passes),), self.solver.timesteps[step]),
            }
            for place, latents in enumerate(every)
        ]

    def guided(self, step: int, state: State, latents: Latents) -> Latents:
        """The weighted sum of a step's predictions, by stream."""
        passes = self.guidance.passes(step)
        summed = {}
        for stream, guidance in zip(self._family.streams, self.guidance.streams, strict=True):
            noisy = NoisyLatents(latents[stream.latents], self.solver.noise_levels[step])
            summed[stream.latents] = combine(
                state[stream.pred].unsqueeze(1),
                torch.tensor(guidance.weights(step)),
                passes.index(COND),
                rescale=guidance.rescale[step],
                noisy=noisy if guidance.rescale_space == "x0" else None,
            )
        return summed

    def trajectory(self) -> Iterator[tuple[int, list[Latents], list[State]]]:
        """Each step with the latents before it and the states to run its segments on, in place.

        The predictions that are then in the states decide the next step's latents.
        """
        initial = self.starts()
        every = initial
        preds: list[list[Latents]] = [[] for _ in initial]
        draws = [self._draws(latents, place) for place, latents in enumerate(initial)]
        for step in range(self.num_steps):
            states = self.states(step, every)
            yield step, every, states
            following: list[Latents] = []
            for place, (latents, state) in enumerate(zip(every, states, strict=True)):
                preds[place].append(self.guided(step, state, latents))
                following.append({
                    name: self.solver.advance(
                        step, x, [one[name] for one in preds[place]], initial[place][name], draws[place][name]
                    )
                    for name, x in latents.items()
                })  # fmt: skip
            every = following

    def _draws(self, latents: Latents, place: int) -> Mapping[str, list[Tensor]]:
        """The noise that a stochastic solver adds."""
        generator = torch.Generator().manual_seed(1000 + place)
        count = sum(self.solver.draws)
        return {
            name: [torch.randn(x.shape, generator=generator) for _ in range(count)]
            for name, x in latents.items()
        }

    def _constants_of(self, place: int, passes: tuple[Pass, ...]) -> State:
        """Text, pictures and position tables of a prompt's rows; pictures are random."""
        key = place, passes
        if key not in self._constants:
            family, workload = self._family, self._options.workload
            rows = [self._texts.uncond if one == UNCOND else self._texts.conds[place] for one in passes]
            text = TextCondition.stacked(rows).guided(self.guidance.embedded)
            generator = torch.Generator().manual_seed(place)
            image = family.random_image(workload, 1, generator) if family.needed_images else None
            constants = family.constants(text, workload, family.defaults.frame_rate, image)
            tensors = family.tensors(workload)
            # All rows see the same picture.
            self._constants[key] = {
                name: tensor.expand(len(passes), *tensor.shape[1:])
                if tensors[name].row_axis == 0 and len(tensor) == 1
                else tensor
                for name, tensor in constants.items()
            }
        return self._constants[key]


def _solver(options: RunOptions) -> SolverTable:
    """The checkpoint's own, of so many steps; the steps of a distilled model are what they are."""
    family, scheduler = options.checkpoint.family, options.checkpoint.scheduler()
    if family.defaults.steps is None:
        family.set_timesteps(scheduler, options.steps, options.workload)
    else:
        family.set_custom_steps(scheduler, family.defaults.steps, options.workload)
    try:
        return SolverTable.from_scheduler(scheduler, per_token=family.steps_per_token(scheduler))
    except InvalidRequest as error:
        raise InvalidRequest(
            f"calibration_steps: expected steps that {type(scheduler).__name__} can take, got "
            f"{options.steps} ({error}): use more"
        ) from error


def _guidance(options: RunOptions, solver: SolverTable) -> Guidance:
    """The family's scales. Every expert must predict at a step, or it would not be calibrated."""
    family = options.checkpoint.family
    steps = len(solver.timesteps)
    resolved = ResolvedGuidance.of_family(family.defaults, options.stg_mode, options.skips)
    if options.skips != read_skips(family.defaults.stg_blocks):
        resolved = _by_turns(resolved, options.skips, steps)
    scheduler = options.checkpoint.scheduler()
    experts = family.experts(solver.timesteps, scheduler.config.num_train_timesteps)
    if len({*experts}) < len(family.transformers):
        raise InvalidRequest(
            f"calibration_steps: expected enough steps for each of {', '.join(family.transformers)} to "
            f"predict at one, got {steps}: use more"
        )
    _, frames, *_ = family.latent_shape(options.workload)
    return Guidance.for_steps(
        solver.noise_levels, resolved, solver.timesteps, frames, experts, family.rescale_space
    )


def _by_turns(given: ResolvedGuidance, built: SkipBlocksByName, steps: int) -> ResolvedGuidance:
    """One block at each step; those that are not the family's own are there for a call to choose from."""
    blocks = {name: [(every[step % len(every)],) for step in range(steps)] for name, every in built.items()}
    sound = None if given.sound is None else _by_turns(given.sound, built, steps)
    return replace(given, stg_blocks=blocks or (), sound=sound)
