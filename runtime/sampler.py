"""The sampling loop: per step, one run of a step program; nothing in it waits for the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from stg_trt.engines.engine import Context, Engine
from stg_trt.engines.manifest import Manifest
from stg_trt.errors import InvalidRequest
from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.plan import StepPlan, plan_step
from stg_trt.models.segment import TEXT, Segment
from stg_trt.models.text import TextCondition

from .bound_plan import BoundPlan
from .device import Device
from .graph import StepGraph
from .noise import Generators, draw_for
from .state import StepBuffers, StepState, two_sided
from .step import Step, StepKey
from .table import StepTable

_MIN_CAPACITY = 64


class SampledStep:
    """A step that was taken; `latents` may be replaced before the next is asked for."""

    def __init__(self, index: int, timestep: float, plan: StepPlan, state: StepState) -> None:
        self.index = index
        self.timestep = timestep
        self.plan = plan
        self.replaced = False
        self._state = state

    @property
    def latents(self) -> Tensor:
        """A copy of the latents after the step, packed float32."""
        return self._state.latents.clone()

    @latents.setter
    def latents(self, latents: Tensor) -> None:
        self._state.latents.copy_(latents)
        self.replaced = True


class Sampler:
    """Runs the engines of one build; keeps memory and bound programs per number of videos."""

    def __init__(
        self, family: ModelFamily, manifest: Manifest, engines: Mapping[str, Engine], device: Device
    ) -> None:
        self.family = family
        self.workload = manifest.workload
        self.segments: tuple[Segment, ...] = tuple(
            record.segment for record in manifest.segments if not record.segment.text
        )
        self._engines = engines
        self._device = device
        self._state: StepState | None = None
        self._text: Context | None = None
        self._programs: dict[StepKey, Step | StepGraph] = {}

    def steps(
        self,
        latents: Tensor,
        cond: TextCondition,
        uncond: TextCondition | None,
        guidance: Guidance,
        solver: SolverTable,
        frame_rate: float,
        generator: Generators | None = None,
    ) -> Iterator[SampledStep]:
        """Yields every step of `guidance`, from packed noise (videos, ...) times `solver.noise_scale`.

        A solver that adds noise draws it from `generator`. Raises InvalidRequest where guidance is on and
        `uncond` is None.
        """
        steps = range(len(guidance.cfg_scale))
        for i in steps:
            if "uncond" in guidance.passes(i) and uncond is None:
                raise InvalidRequest(
                    f"negative_prompt_embeds: expected embeddings for guidance_scale {guidance.cfg_scale[i]} "
                    f"at step {i}, got none: give them or set guidance_scale to 1"
                )
        state = self.prepare(latents, cond, uncond, guidance, solver, frame_rate, generator)
        for i in steps:
            with self._device.scope():
                program = self.program(StepKey.of(guidance, solver, i), state)
                program.enqueue()
            step = SampledStep(i, solver.timesteps[i], program.plan, state)
            yield step
            if step.replaced:
                _check_replaceable(solver, i)

    def prepare(
        self,
        latents: Tensor,
        cond: TextCondition,
        uncond: TextCondition | None,
        guidance: Guidance,
        solver: SolverTable,
        frame_rate: float,
        generator: Generators | None = None,
    ) -> StepState:
        """Writes a run's start, tables and constants into the static memory, as `steps` does."""
        with self._device.scope():
            state = self._prepared(latents, guidance, solver)
            text = TextCondition.stacked((uncond or cond, cond, cond)).guided(guidance.embedded)
            if None in solver.two_term:
                state.add_noise(draw_for(solver, len(guidance.cfg_scale), latents.shape, generator))
            self._write_position_tables(state, frame_rate)
            self._write_text(state.buffers, text)
        return state

    def program(self, key: StepKey, state: StepState) -> Step | StepGraph:
        """The program of a guidance state, captured where the device can."""
        if key not in self._programs:
            plan = plan_step(self.segments, key.passes, key.perturbation)
            runner = BoundPlan(plan, self._engines, state.buffers, self.family.borders)
            program = Step(key, runner, state, self._device.stream)
            captured = StepGraph(program, state, self._device) if self._device.captures else program
            self._programs[key] = captured
        return self._programs[key]

    def _prepared(self, latents: Tensor, guidance: Guidance, solver: SolverTable) -> StepState:
        """The static memory with a run's start written into it; allocated again only where it must grow."""
        steps, multistep = len(guidance.cfg_scale), None in solver.two_term
        noises = len(solver.used_draws(steps))
        state = self._state
        if (
            state is None
            or state.buffers.videos != len(latents)
            or state.table.capacity < steps
            or (multistep and state.history is None)
            or state.table.slots - state.table.capacity < noises
        ):
            state = self._state = self._allocate(latents, max(steps, _MIN_CAPACITY), multistep, noises)
            self._programs.clear()
            self._text = self._bound_text(state.buffers) if self.family.has_text_segment else None
        state.table.load(guidance, solver)
        state.start(latents)
        return state

    def _allocate(self, latents: Tensor, capacity: int, multistep: bool, noises: int) -> StepState:
        specs = list(self.family.tensors(self.workload).values())
        both = two_sided(self.segments, self.family.borders)
        device = self._device.torch_device

        def empty(*leading: int) -> Tensor:
            return torch.zeros(*leading, *latents.shape, device=device)

        table = StepTable(capacity, device, noises)
        return StepState(
            buffers=StepBuffers(specs, both, len(latents), device),
            table=table,
            latents=empty(),
            initial=empty(),
            history=empty(table.slots) if multistep else None,
        )

    def _bound_text(self, buffers: StepBuffers) -> Context:
        """The projection of the prompt, over the rows of all passes."""
        context = self._engines[TEXT.name].context()
        for name in (*self.family.borders(TEXT)[0], *self.family.borders(TEXT)[1]):
            context.bind(name, buffers.view(name))
        return context

    def _write_position_tables(self, state: StepState, frame_rate: float) -> None:
        """Computes and copies the tables, tens of megabytes, unless the last run had the same ones."""
        if state.frame_rate == frame_rate:
            return
        state.frame_rate = None
        for name, tensor in self.family.position_tables(self.workload, frame_rate).items():
            state.buffers.view(name).copy_(tensor)
        state.frame_rate = frame_rate

    def _write_text(self, buffers: StepBuffers, text: TextCondition) -> None:
        """Embeddings and masks of the whole run; the skip rows have the prompt of cond."""
        for name, tensor in self.family.text_inputs(text, self.workload).items():
            buffers.view(name).copy_(tensor)
        if self._text is not None:
            self._text.enqueue(self._device.stream)


def _check_replaceable(solver: SolverTable, step: int) -> None:
    if any(pair is None for pair in solver.two_term[step + 1 :]):
        raise InvalidRequest(
            "callback_on_step_end: expected a single-step solver (flow Euler, DDIM) to replace latents, "
            "got a multi-step one, which continues from its history: return no latents or change scheduler"
        )
