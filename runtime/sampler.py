"""The sampling loop: one prepared step after the other; nothing in it waits for the host."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stg_trt.engines.engine import Context, Engine
from stg_trt.engines.manifest import Manifest
from stg_trt.errors import InvalidRequest, NotFinite
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.image import ImageCondition, Places
from stg_trt.models.passes import COND, UNCOND, Pass, most_groups
from stg_trt.models.plan import StepPlan, plan_step
from stg_trt.models.ranks import split_passes
from stg_trt.models.segment import Segment
from stg_trt.models.text import TextCondition

from .bound_plan import BoundPlan
from .device import Device
from .graph import StepGraph
from .noise import draw_for
from .rank_group import RankGroup
from .run_inputs import RunInputs
from .state import RunSize, RunState, StepBuffers, StepState, find_ping_pong, find_unforked
from .step import Step
from .step_key import StepKey, first_steps

_log = logging.getLogger(__name__)
_MIN_STEPS = 64


class SampledStep:
    """A step that was taken; the latents of its streams may be `replaced` before the next is asked for.

    `finite` is a bool of shape () on the device, which nothing waits for. With `continued`, later steps go
    on from the history of the solver, and other latents are refused with InvalidRequest.
    """

    def __init__(
        self, index: int, timestep: float, plan: StepPlan, state: RunState, finite: Tensor, continued: bool
    ) -> None:
        self.finite = finite
        self.index = index
        self.timestep = timestep
        self.plan = plan
        self.replaced = False
        self._state = state
        self._continued = continued

    @property
    def latents(self) -> Tensor:
        """A copy of the video's latents after the step, packed float32."""
        return self._state.video.latents.clone()

    @property
    def of_streams(self) -> dict[str, Tensor]:
        """Copies of the latents of every stream, under their names in calls."""
        return {state.stream.latents: state.latents.clone() for state in self._state.streams}

    @property
    def distances(self) -> dict[str, float]:
        """How far from cond the video's prediction by every other pass is, as a share of cond's length."""
        state, plan = self._state.video, self.plan
        preds = {one.name: state.pred_rows(plan.groups([one])).float() for one in plan.passes}
        cond = preds.pop(COND.name)
        return {name: float((cond - pred).norm() / cond.norm()) for name, pred in preds.items()}

    def replace(self, latents: Mapping[str, Tensor]) -> None:
        """Goes on from other latents, of every stream; raises InvalidRequest if that cannot be."""
        self.replaced = True
        for state in self._state.streams:
            replacement = latents[state.stream.latents]
            # Compared only if it decides: comparing waits for the device.
            if self._continued and not _same(replacement, state.latents):
                raise InvalidRequest(
                    "callback_on_step_end: expected a single-step solver (flow Euler, DDIM) to replace "
                    "latents, got one that continues from its history: return no latents or change scheduler"
                )
            state.latents.copy_(replacement)


class Sampler:
    """Runs the engines of one build; keeps memory and bound steps for one number of videos.

    With `ranks` it computes its rank's part of every step, and all of them take the same steps.
    """

    def __init__(
        self,
        family: ModelFamily,
        manifest: Manifest,
        engines: Mapping[str, Engine],
        device: Device,
        ranks: RankGroup | None = None,
    ) -> None:
        self.family = family
        self.workload = manifest.workload
        segments = [record.segment for record in manifest.segments]
        self.segments: tuple[Segment, ...] = tuple(one for one in segments if not one.text)
        self._text_segments = [one for one in segments if one.text]
        self._engines = engines
        self._groups = most_groups(len(manifest.skips), family.isolates)
        self._device = device
        self.ranks = ranks
        self._state: RunState | None = None
        self._texts: list[Context] = []
        self._bound: dict[StepKey, Step | StepGraph] = {}

    def steps(self, run: RunInputs) -> Iterator[SampledStep]:
        """Yields every step of a run; raises InvalidRequest if guidance is on and `uncond` is None."""
        guidance, solver = run.guidance, run.solver
        steps = range(len(guidance.cfg_scale))
        for i in steps:
            if UNCOND in guidance.passes(i) and run.uncond is None:
                raise InvalidRequest(
                    f"negative_prompt_embeds: expected embeddings for guidance_scale {guidance.cfg_scale[i]} "
                    f"at step {i}, got none: give them or set guidance_scale to 1"
                )
        state = self.prepare(run)
        self._bind_all(run, state)
        for i in steps:
            with self._device.scope():
                if run.clean == "noised" and state.video.clean is not None:
                    state.video.clean.draw(run.generator, solver.timesteps[i])
                step = self.step(StepKey.of(guidance, solver, i, run.clean), state)
                step.enqueue()
                finite = torch.stack([stream.latents.isfinite().all() for stream in state.streams]).all()
            continued = any(pair is None for pair in solver.single_step[i + 1 :])
            yield SampledStep(i, solver.timesteps[i], step.plan, state, finite, continued)

    def prepare(self, run: RunInputs) -> RunState:
        """Writes a run's start, tables and constants into the static memory, as `steps` does."""
        with self._device.scope():
            image, starts = run.image, [run.latents[one.latents] for one in self.family.streams]
            size = RunSize.of(starts[0], run.guidance, run.solver)
            state = self._state_for(size, [start.shape for start in starts])
            state.load(run.guidance, run.solver)
            for stream, start in zip(state.streams, starts, strict=True):
                stream.start(start)
                if not size.single_step:
                    stream.add_noise(draw_for(run.solver, run.guidance.num_steps, start.shape, run.generator))
            if image is not None and image.clean is not None:
                state.video.hold(image.clean, single_step=size.single_step)
            rows = (run.uncond or run.cond, *[run.cond] * (state.buffers.groups - 1))
            text = TextCondition.stacked(rows).guided(run.guidance.embedded)
            self._write_position_tables(state, run.frame_rate, () if image is None else image.placed)
            self._write_image(state.buffers, image)
            for name, tensor in self.family.timestep_tables(self.workload, image).items():
                state.buffers.view(name).copy_(tensor)
            self._write_text(state.buffers, text)
        return state

    def spread_latents(self) -> None:
        """Gives every rank the latents of the first, which were replaced there."""
        assert self.ranks is not None and self._state is not None
        with self._device.scope():
            for stream in self._state.streams:
                own = slice(0, len(stream.latents) if self.ranks.rank == 0 else 0)
                self.ranks.exchange(stream.latents, own)(self._device.stream)

    def wait(self) -> None:
        """Until the device has done all that was enqueued."""
        if self._device.torch_device.type == "cuda":
            torch.cuda.synchronize(self._device.torch_device)

    def step(self, key: StepKey, state: RunState) -> Step | StepGraph:
        """The step of a guidance state; bound when first asked for, and captured if the device can."""
        if key not in self._bound:
            _log.info("binding %s", key.name)
            plan = plan_step(self.segments, key.passes, key.expert, self._part(key))
            bound = BoundPlan(plan, self._engines, state.buffers, self.family.borders, self._device)
            step = Step(key, bound, state, self._device, self.ranks)
            captured = StepGraph(step, state, self._device) if self._device.captures else step
            self._bound[key] = captured
        return self._bound[key]

    def _part(self, key: StepKey) -> tuple[Pass, ...]:
        """The passes of a step that are computed here."""
        if self.ranks is None:
            return key.passes

        def per_row(segment: Segment) -> int:
            return self.family.segment_flops(segment, self.workload)

        return split_passes(self.segments, key.passes, self.ranks.size, per_row, key.expert)[self.ranks.rank]

    def _bind_all(self, run: RunInputs, state: RunState) -> None:
        """Every guidance state of a run before its first step, each on the values of the first it serves."""
        with self._device.scope():
            for key, first in first_steps(run.guidance, run.solver, run.clean).items():
                if key not in self._bound:
                    state.go_to(first)
                    self.step(key, state)
            state.go_to(0)

    def _state_for(self, size: RunSize, shapes: Sequence[torch.Size]) -> RunState:
        """The static memory, reallocated only when it must grow; the old memory is freed first."""
        if self._state is None or not self._state.fits(size):
            _log.info("new static memory for %d videos and %d steps", size.videos, size.steps)
            self._bound.clear()
            self._state, self._texts = None, []
            buffers = self._buffers_for(size)
            self._texts = [self._bound_text(segment, buffers) for segment in self._text_segments]
            roomy = replace(size, steps=max(size.steps, _MIN_STEPS))
            self._state = RunState(buffers, tuple(
                StepState.allocate(buffers, shape, roomy, stream)
                for shape, stream in zip(shapes, self.family.streams, strict=True)
            ))  # fmt: skip
        return self._state

    def _buffers_for(self, size: RunSize) -> StepBuffers:
        """Memory for all that crosses a border of the build."""
        borders, texts = self.family.borders, self._text_segments
        # A rank may compute a skip pass from its start, which then has rows of its own everywhere.
        unforked = find_unforked(self.segments, borders) if self.ranks is None else frozenset[str]()
        crossing = {name for s in (*texts, *self.segments) for names in borders(s) for name in names}
        return StepBuffers(
            [spec for name, spec in self.family.tensors(self.workload).items() if name in crossing],
            find_ping_pong(self.segments, borders),
            size.videos,
            self._device.torch_device,
            max(size.groups, self._groups),
            unforked,
            {name: len(texts) for segment in texts for name in borders(segment)[1]},
        )

    def _bound_text(self, segment: Segment, buffers: StepBuffers) -> Context:
        """The projection of the prompt by an expert, over the rows of all passes."""
        context = self._engines[segment.name].context()
        inputs, outputs = self.family.borders(segment)
        for name in (*inputs, *outputs):
            context.bind(name, buffers.view(name, turn=segment.expert))
        return context

    def _write_position_tables(self, state: RunState, frame_rate: float, placed: Places) -> None:
        """Computes and copies the tables, tens of megabytes, unless the last run had the same ones."""
        if state.positions == (frame_rate, placed):
            return
        state.positions = None
        for name, tensor in self.family.position_tables(self.workload, frame_rate, placed).items():
            state.buffers.view(name).copy_(tensor)
        state.positions = (frame_rate, placed)

    def _write_image(self, buffers: StepBuffers, image: ImageCondition | None) -> None:
        """What pictures add; uncond may see another than the other passes."""
        if image is None:
            return
        unseen = self.family.image_inputs(self.family.uncond_image(image))
        for name, tensor in self.family.image_inputs(image).items():
            uncond, *others = buffers.view(name).split(buffers.videos)
            uncond.copy_(unseen[name])
            for rows in others:
                rows.copy_(tensor)

    def _write_text(self, buffers: StepBuffers, text: TextCondition) -> None:
        """Embeddings and masks of the whole run; the skip rows have the prompt of cond."""
        for name, tensor in self.family.text_inputs(text, self.workload).items():
            buffers.view(name).copy_(tensor)
        for context in self._texts:
            context.enqueue(self._device.stream)


def _same(latents: Tensor, others: Tensor) -> bool:
    """Whether they are equal; NaN is equal to itself, and reported when the run has ended."""
    return torch.allclose(latents.to(others), others, rtol=0, atol=0, equal_nan=True)


def check_finite(steps: list[Tensor]) -> None:
    """Raises NotFinite for the first step that left anything else; `steps` are bools of shape ()."""
    wrong = torch.stack(steps).logical_not().nonzero() if steps else torch.empty(0)
    if len(wrong):
        raise NotFinite(
            f"latents: expected finite numbers, got NaN or infinity after step {int(wrong[0]) + 1} of "
            f"{len(steps)}: check the checkpoint's weights and the prompt's embeddings, or use lower scales"
        )
