"""Which segments one guidance state runs, and with which rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from stg_trt.models.passes import PASSES, Pass
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.segment import Segment


@dataclass(frozen=True)
class SegmentRun:
    """One segment over the rows of `passes`, which lie next to each other.

    `fork`: before it, the skip rows start as a copy of the cond rows. `bypass`: the skip rows are not
    computed, they pass the segment unchanged (stg-r). `perturbed`: the skip rows keep no self-attention.
    """

    segment: Segment
    passes: tuple[Pass, ...]
    fork: bool = False
    bypass: bool = False
    perturbed: bool = False


@dataclass(frozen=True)
class StepPlan:
    """The runs of one step, for one set of passes and one perturbation."""

    passes: tuple[Pass, ...]
    runs: tuple[SegmentRun, ...]

    def flops(self, per_row: Callable[[Segment], int]) -> int:
        """Floating-point operations of one step of one video."""
        return sum(per_row(run.segment) * len(run.passes) for run in self.runs)


def plan_step(
    segments: Sequence[Segment], passes: tuple[Pass, ...], perturbation: Perturbation | None
) -> StepPlan:
    """The plan for a step: exact, since up to its first perturbed block the skip pass is the cond pass."""
    skipped = [segment for segment in segments if segment.skipped]
    if skipped or perturbation is None:
        runs = _whole_runs(segments, passes)
    else:
        runs = _shared_runs(segments, passes, perturbation)
    return StepPlan(passes, tuple(runs))


def row_counts(segments: Sequence[Segment], segment: Segment, built: Perturbation) -> frozenset[int]:
    """The rows per video that a step can run a segment with, with any passes and any part of `built`.

    One block at a time shows them all: before it the skip pass is the cond pass, after it both are computed.
    """
    if any(other.skipped for other in segments):
        parts = [built]
    else:
        parts = [Perturbation(mode, (block,)) for mode in {built.mode, "stg-r"} for block in built.blocks]
    plans = [plan_step(segments, ("cond",), None), plan_step(segments, ("uncond", "cond"), None)]
    with_skip: tuple[tuple[Pass, ...], ...] = (("cond", "skip"), PASSES)
    plans += [plan_step(segments, passes, part) for passes in with_skip for part in parts]
    runs = (run for plan in plans for run in plan.runs)
    return frozenset(len(run.passes) for run in runs if run.segment == segment)


def full_plan(
    segments: Sequence[Segment], passes: tuple[Pass, ...], perturbation: Perturbation | None
) -> StepPlan:
    """Every pass runs from the first segment on, nothing is shared: the reference for the shared plan."""
    runs = [SegmentRun(segment, passes) for segment in segments]
    if perturbation is not None:
        runs = [_perturbed_run(run, perturbation) for run in runs]
    return StepPlan(passes, tuple(runs))


def _whole_runs(segments: Sequence[Segment], passes: tuple[Pass, ...]) -> list[SegmentRun]:
    runs = [SegmentRun(segment, _plain(passes)) for segment in segments if not segment.skipped]
    if "skip" in passes:
        runs += [SegmentRun(segment, ("skip",)) for segment in segments if segment.skipped]
    return runs


def _shared_runs(
    segments: Sequence[Segment], passes: tuple[Pass, ...], perturbation: Perturbation
) -> list[SegmentRun]:
    runs, forked = [], False
    for segment in segments:
        run = _perturbed_run(SegmentRun(segment, passes), perturbation)
        perturbed = run.perturbed or run.bypass
        if perturbed and not forked:
            run, forked = replace(run, fork=True), True
        runs.append(run if forked else replace(run, passes=_plain(passes)))
    return runs


def _perturbed_run(run: SegmentRun, perturbation: Perturbation) -> SegmentRun:
    """The run as the perturbation changes it, if its block is perturbed."""
    segment = run.segment
    if segment.front or segment.back or segment.start not in perturbation.blocks:
        return run
    if perturbation.mode == "stg-r":
        return replace(run, passes=_plain(run.passes), bypass=True)
    return replace(run, perturbed=True)


def _plain(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    return tuple(name for name in passes if name != "skip")
