"""A plan that perturbs nothing, which every benchmark must notice before it times anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stg_trt.models.passes import Pass
from stg_trt.models.plan import StepPlan, plan_step
from stg_trt.models.segment import Segment


def unperturbed(
    segments: Sequence[Segment],
    passes: Sequence[Pass],
    expert: int = 0,
    computed: Sequence[Pass] | None = None,
) -> StepPlan:
    """The right segments and rows, with self-attention kept in the skip row."""
    plan = plan_step(segments, passes, expert, computed)
    return replace(plan, runs=tuple(replace(run, perturbed=()) for run in plan.runs))
