"""The same steps by diffusers' own transformer, eager, with all passes in one batch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from stg_trt.benchmarks.eager_step import EagerStep, perturbed_skip_row
from stg_trt.benchmarks.scenario import Scenario
from stg_trt.benchmarks.verify import load_model
from stg_trt.models.passes import Pass

from .clips import NUM_FRAMES, SIZE
from .settings import BLOCK


@dataclass
class EagerSteps:
    """Steps of a checkpoint's transformer with random weights, which take as long; and their milliseconds."""

    scenario: Scenario
    step_ms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        device = self.scenario.device()
        self._model = load_model(self.scenario, device)
        self._inputs = self.scenario.inputs()
        self._step = EagerStep(self.scenario, self._model, self._inputs, torch.float32, device.torch_device)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """All of them are computed in full."""
        return self.scenario.passes

    def run(self, count: int) -> None:
        """Times that many steps."""
        with perturbed_skip_row(self.scenario, self._model):
            for _ in range(count):
                start = time.perf_counter()
                self._step.step(self._inputs.noise, self._inputs.middle, [*self._inputs.earlier])
                self.step_ms.append((time.perf_counter() - start) * 1e3)


def eager_steps(checkpoint: Path) -> tuple[EagerSteps, EagerSteps]:
    """CFG, and CFG with STG."""
    size = (SIZE, SIZE, NUM_FRAMES, 16)
    with_stg = Scenario(str(checkpoint), *size, "stg-a", (BLOCK,), "onnxruntime")
    return EagerSteps(replace(with_stg, stg=False)), EagerSteps(with_stg)
