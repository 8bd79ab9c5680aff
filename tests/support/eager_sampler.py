"""A sampler over eager engines of a family's tiny model: nothing is exported or compiled."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from stg_trt.engines.manifest import Manifest
from stg_trt.guidance.options import GuidanceOptions
from stg_trt.guidance.resolved import OFF
from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.segment import TEXT, cut
from stg_trt.models.text import TextCondition
from stg_trt.runtime.device import Device
from stg_trt.runtime.run_inputs import RunInputs
from stg_trt.runtime.sampler import SampledStep, Sampler
from tests.support.eager_engine import EagerEngine
from tests.support.family_cases import LTX, FamilyCase

STEPS = 5


def sampler_on(device: Device, case: FamilyCase = LTX) -> Sampler:
    """Blocks 1 and 3 can be perturbed, one by one or both, by stg-a or stg-r."""
    # A family of its own, so that a test may replace a method.
    family = type(case.family)(case.family.config)
    cuts = cut("segmented", family.num_blocks, "stg-a", (1, 3))
    segments = (TEXT, *cuts) if family.has_text_segment else cuts
    model = case.checkpoint.load_transformer().to(device.torch_device)
    engines = {s.name: EagerEngine(family.module(model, s, expand_masks=False)) for s in segments}
    manifest = SimpleNamespace(
        workload=case.workload,
        segments=[SimpleNamespace(segment=segment) for segment in segments],
        skips={},
    )
    return Sampler(family, cast(Manifest, manifest), engines, device)


def steps_of(
    sampler: Sampler,
    case: FamilyCase = LTX,
    *,
    videos: int = 2,
    frame_rate: float = 25.0,
    cond: TextCondition | None = None,
    scheduler: Any = None,
    **scales: Any,
) -> Iterator[SampledStep]:
    """A run from the same noise every time; flow Euler and CFG unless told otherwise."""
    guidance = Guidance.for_steps(
        [0.0] * STEPS, GuidanceOptions(**{"guidance_scale": 3.0, **scales}).resolve(OFF)
    )
    solver = SolverTable.from_scheduler(scheduler or FlowMatchEulerDiscreteScheduler(), STEPS)
    generator = torch.Generator().manual_seed(11)
    texts = cond or case.text(videos, seed=1), case.text(videos, seed=2)
    start = {"latents": case.latents(videos)}
    return sampler.steps(RunInputs(start, *texts, guidance, solver, frame_rate, generator))


@torch.no_grad()
def run(sampler: Sampler, case: FamilyCase = LTX, **options: Any) -> list[Tensor]:
    """Latents after every step."""
    return [step.latents for step in steps_of(sampler, case, **options)]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit, after every step."""
    assert len(got) == len(expected) == STEPS
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
