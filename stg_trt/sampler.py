"""The sampling loop: per step, the plan's engine runs, then guidance and the solver's step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stg_trt.engine import Engine
from stg_trt.errors import InvalidRequest
from stg_trt.families.base import ModelFamily, TextCondition
from stg_trt.guidance import Guidance, combine
from stg_trt.manifest import Manifest
from stg_trt.perturbation import Perturbation
from stg_trt.segment import TEXT, Segment
from stg_trt.solver import SolverTable
from stg_trt.step_plan import StepPlan, plan_step
from stg_trt.step_runner import StepBuffers, StepRunner, two_sided

StateKey = tuple[tuple[str, ...], Perturbation | None]


@dataclass
class SampledStep:
    """Latents after a step, packed float32; the consumer may replace them before asking for the next."""

    index: int
    timestep: float
    latents: Tensor
    plan: StepPlan


class Sampler:
    """Runs the engines of one build; keeps buffers and bound plans per number of videos."""

    def __init__(self, family: ModelFamily, manifest: Manifest, engines: Mapping[str, Engine]) -> None:
        self.family = family
        self.workload = manifest.workload
        self.segments: tuple[Segment, ...] = tuple(
            record.segment for record in manifest.segments if not record.segment.text
        )
        self._engines = engines
        self._buffers: StepBuffers | None = None
        self._runners: dict[StateKey, StepRunner] = {}

    def steps(
        self,
        latents: Tensor,
        cond: TextCondition,
        uncond: TextCondition | None,
        guidance: Guidance,
        solver: SolverTable,
        frame_rate: float,
    ) -> Iterator[SampledStep]:
        """Yields the latents after every step of `guidance`, from packed noise times `solver.noise_scale`.

        Raises InvalidRequest where guidance is on and `uncond` is None.
        """
        buffers = self._buffers_for(len(latents))
        self._write_constants(buffers, cond, uncond, frame_rate)
        initial = latents.float()
        current, preds = initial, list[Tensor]()
        for i, timestep in zip(range(len(guidance.cfg_scale)), solver.timesteps, strict=False):
            if "uncond" in guidance.passes(i) and uncond is None:
                raise InvalidRequest(
                    f"negative_prompt_embeds: expected embeddings for guidance_scale {guidance.cfg_scale[i]} "
                    f"at step {i}, got none: give them or set guidance_scale to 1"
                )
            runner = self._runner(guidance.passes(i), guidance.perturbation(i), buffers)
            pred = self._predict(runner, buffers, current * solver.input_scale[i], timestep, guidance, i)
            preds.append(pred)
            current = solver.advance(i, current, preds, initial)
            step = SampledStep(i, timestep, current, runner.plan)
            yield step
            if step.latents is not current:
                _check_replaceable(solver, i)
                current = step.latents.float()

    def _predict(
        self,
        runner: StepRunner,
        buffers: StepBuffers,
        model_input: Tensor,
        timestep: float,
        guidance: Guidance,
        step: int,
    ) -> Tensor:
        """Runs one step's passes and combines their predictions."""
        passes = runner.plan.passes
        for group in passes:
            buffers.view("latents", (group,)).copy_(model_input)
        buffers.view("timestep").fill_(timestep)
        runner.enqueue()
        preds = {f"pred_{group}": buffers.view("pred", (group,)) for group in passes}
        return combine(
            **preds,
            cfg_scale=guidance.cfg_scale[step],
            stg_scale=guidance.stg_scale[step] if "skip" in passes else 0.0,
            rescale=guidance.rescale[step],
            cfg_zero_star=guidance.cfg_zero_star,
        ).clone()

    def _buffers_for(self, videos: int) -> StepBuffers:
        if self._buffers is None or self._buffers.videos != videos:
            specs = list(self.family.tensors(self.workload).values())
            both = two_sided(self.segments, self.family.borders)
            self._buffers = StepBuffers(specs, both, videos, torch.device("cpu"))
            self._runners.clear()
        return self._buffers

    def _runner(
        self, passes: tuple[str, ...], perturbation: Perturbation | None, buffers: StepBuffers
    ) -> StepRunner:
        key = passes, perturbation
        if key not in self._runners:
            plan = plan_step(self.segments, passes, perturbation)
            self._runners[key] = StepRunner(plan, self._engines, buffers, self.family.borders)
        return self._runners[key]

    def _write_constants(
        self, buffers: StepBuffers, cond: TextCondition, uncond: TextCondition | None, frame_rate: float
    ) -> None:
        """Text, masks and position tables of the whole run; the skip rows have the prompt of cond."""
        groups = (uncond or cond, cond, cond)
        text = TextCondition(
            torch.cat([group.embeds for group in groups]), torch.cat([group.mask for group in groups])
        )
        for name, tensor in self.family.constants(text, self.workload, frame_rate).items():
            buffers.view(name).copy_(tensor)
        if self.family.has_text_segment:
            context = self._engines[TEXT.name].context()
            for name in (*self.family.borders(TEXT)[0], *self.family.borders(TEXT)[1]):
                context.bind(name, buffers.view(name))
            context.enqueue(0)


def _check_replaceable(solver: SolverTable, step: int) -> None:
    if any(pair is None for pair in solver.two_term[step + 1 :]):
        raise InvalidRequest(
            "callback_on_step_end: expected a single-step solver (flow Euler, DDIM) to replace latents, "
            "got a multi-step one, which continues from its history: return no latents or change scheduler"
        )
