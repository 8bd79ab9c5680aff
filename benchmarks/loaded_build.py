"""A loaded build with one request written into it, ready to run any plan over and over."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stg_trt.engines.store import Build
from stg_trt.models.passes import row_groups
from stg_trt.models.plan import StepPlan
from stg_trt.runtime.bound_plan import BoundPlan
from stg_trt.runtime.device import Device
from stg_trt.runtime.graph import StepGraph
from stg_trt.runtime.sampler import Sampler
from stg_trt.runtime.step import Step
from stg_trt.runtime.step_key import StepKey

from .clock import Work
from .memory import memory_in_use
from .scenario import Inputs, Scenario
from .verify import rows_by_pass


class LoadedBuild:
    """Engines, buffers and steps of one build; `loaded_bytes` is what they took."""

    def __init__(self, scenario: Scenario, build: Build, inputs: Inputs, device: Device) -> None:
        self.build = build
        self._scenario = scenario
        self._inputs = inputs
        self._device = device
        self._before_bytes = memory_in_use(device)
        self._engines = build.load_engines(device)
        self.sampler = Sampler(scenario.family, build.manifest, self._engines, device)
        self.guidance = scenario.guidance(inputs.solver)
        self.state = self.sampler.prepare(inputs.run(self.guidance))
        self._earlier = inputs.earlier.to(device.torch_device)
        self.loaded_bytes = 0
        self.measure_memory()

    def measure_memory(self) -> None:
        """Takes the memory again, after graphs were captured."""
        self.loaded_bytes = max(0, memory_in_use(self._device) - self._before_bytes)

    def step(self, plan: StepPlan) -> Step:
        """A whole step of the plan: row fan-out, engines, guidance, solver."""
        stg = any(one.is_skip for one in plan.passes)
        guidance = self._scenario.guidance(self._inputs.solver, stg=stg)
        key = StepKey.of(guidance, self._inputs.solver, self._inputs.middle)
        assert key.passes == plan.passes
        borders = self._scenario.family.borders
        bound = BoundPlan(plan, self._engines, self.state.buffers, borders, self._device)
        return Step(key, bound, self.state, self._device)

    def captured(self, step: Step) -> StepGraph:
        """The step as a CUDA graph."""
        with self._device.scope():
            self.reset()
            return StepGraph(step, self.state, self._device)

    def work(self, step: Step | StepGraph) -> Work:
        """To be timed: always the middle step, from the same latents."""
        return Work(step.enqueue, self.reset)

    def reset(self) -> None:
        """Back to before the middle step."""
        for stream, noise in zip(self.state.streams, self._inputs.starts, strict=True):
            stream.start(noise)
        history = self.state.video.history
        if history is not None:
            history[: len(self._earlier)].copy_(self._earlier)
        self.state.go_to(self._inputs.middle)

    def preds(self, step: Step | StepGraph) -> dict[str, Tensor]:
        """One run's predictions for each of its passes; rows that it does not write are NaN."""
        passes = step.plan.passes
        with self._device.scope():
            pred = self.state.video.pred_rows(row_groups(passes))
            pred.fill_(float("nan"))
            self.reset()
            step.enqueue()
            return rows_by_pass(pred.float(), passes)

    def to_json(self) -> dict[str, Any]:
        """For a result."""
        seconds = [record.seconds for record in self.build.manifest.segments]
        return {
            "weight_bytes": self.build.manifest.engine_bytes,
            "loaded_bytes": self.loaded_bytes,
            "build_s": round(sum(sum(stages.values()) for stages in seconds), 1),
            "build_peak_bytes": self.build.manifest.peak_bytes,
            "target": self.build.manifest.target,
            "versions": self.build.manifest.versions,
        }
