"""A middle step of a solver with history continues from predictions of the steps before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stg_trt.benchmarks.eager_step import EagerStep, perturbed_skip_row
from stg_trt.benchmarks.loaded_build import LoadedBuild
from stg_trt.benchmarks.scenario import Scenario
from stg_trt.models.plan import plan_step


@pytest.mark.slow(reason="exports the graphs of Wan")
def test_a_step_starts_from_a_history(engines: Path, wan_scenario: Scenario) -> None:
    inputs, device = wan_scenario.inputs(6), wan_scenario.device()
    assert None in inputs.solver.single_step and inputs.middle == 3
    loaded = LoadedBuild(wan_scenario, wan_scenario.build("segmented", engines), inputs, device)
    plan = plan_step(loaded.sampler.segments, wan_scenario.passes)
    work = loaded.work(loaded.step(plan))
    for _ in range(2):
        work.reset()
        work.run()
    found = loaded.state.video.latents

    model, preds = wan_scenario.opened.load_transformer(), [*inputs.earlier]
    with perturbed_skip_row(wan_scenario, model):
        eager = EagerStep(wan_scenario, model, inputs, torch.float32, "cpu")
        expected = eager.step(inputs.noise, inputs.middle, preds)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert len(preds) == inputs.middle + 1
    forgotten = inputs.solver.advance(
        inputs.middle, inputs.noise, [*torch.zeros_like(inputs.earlier), preds[-1]], inputs.noise
    )
    assert (found - forgotten).abs().max() > 0.1
