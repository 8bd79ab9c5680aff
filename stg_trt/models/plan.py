"""Which segments one guidance state runs, and with which rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

from stg_trt.models.families.keep_flags import KEEP_ATTENTION, KEEP_AUDIO_ATTENTION, KEEP_CROSS, KEEP_LAYER
from stg_trt.models.passes import COND, ISOLATION, SKIP, UNCOND, Pass, in_order, row_groups
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.segment import Segment, blocks_of_expert

_STREAM_OF_FLAG = {KEEP_ATTENTION: "video", KEEP_AUDIO_ATTENTION: "audio"}


@dataclass(frozen=True)
class SegmentRun:
    """One segment over the rows of `passes`, which lie next to each other.

    `forks`: before it, the rows of these passes start as a copy of cond's. `perturbed`: their rows keep no
    self-attention. `bypassed`: their rows pass the segment unchanged (stg-r); those of them that lie between
    others in `passes` are computed, and put back. `reduced`: stg-r in a segment that does it inside.
    """

    segment: Segment
    passes: tuple[Pass, ...]
    forks: tuple[Pass, ...] = ()
    bypassed: tuple[Pass, ...] = ()
    perturbed: tuple[Pass, ...] = ()
    reduced: tuple[Pass, ...] = ()

    def keeps(self, flag: str, one: Pass) -> bool:
        """The value of an input that switches a part off, for the rows of one of its passes."""
        if flag == KEEP_CROSS:
            return one != ISOLATION
        if flag == KEEP_LAYER:
            return one not in self.reduced
        if one not in self.perturbed or one.perturbation is None:
            return True
        return one.perturbation.stream not in ("", _STREAM_OF_FLAG[flag])


@dataclass(frozen=True)
class StepPlan:
    """The runs of one step, for one set of passes.

    `computed` are the passes that the runs compute: all, or a rank's part of them, which may be empty.
    `expert` is the transformer that runs.
    """

    passes: tuple[Pass, ...]
    runs: tuple[SegmentRun, ...]
    computed: tuple[Pass, ...]
    expert: int = 0

    def flops(self, per_row: Callable[[Segment], int]) -> int:
        """Floating-point operations of one step of one video."""
        return sum(per_row(run.segment) * len(run.passes) for run in self.runs)

    def groups(self, passes: Sequence[Pass]) -> range:
        """The row groups of neighbouring passes."""
        first = row_groups(self.passes)[self.passes.index(passes[0])]
        return range(first, first + len(passes))


def plan_step(
    segments: Sequence[Segment],
    passes: Sequence[Pass],
    expert: int = 0,
    computed: Sequence[Pass] | None = None,
) -> StepPlan:
    """The plan for a step: exact, since up to its first perturbed block a skip pass is the cond pass.

    Of a model's segments it takes those of one expert; of the passes it computes all, or the neighbours in
    `computed`.
    """
    ordered, segments = in_order(passes), blocks_of_expert(segments, expert)
    part = ordered if computed is None else in_order(computed)
    twin = any(segment.skipped for segment in segments)
    runs = (_whole_runs if twin else _shared_runs)(segments, part)
    return StepPlan(ordered, tuple(run for run in runs if run.passes), part, expert)


def row_counts(
    segments: Sequence[Segment],
    segment: Segment,
    built: Perturbation,
    skips: int = 1,
    isolates: bool = False,
) -> frozenset[int]:
    """The rows per video that a step can run a segment with: up to `skips` passes, any part of `built`.

    One block per pass shows them all: before it a skip pass is the cond pass, after it both are computed.
    `isolates`: the model has an isolation pass.
    """
    if any(other.skipped for other in segments):
        parts = [built] if built.blocks else []
    else:
        parts = [Perturbation(mode, (block,)) for mode in {built.mode, "stg-r"} for block in built.blocks]
    chosen = (
        [Pass(f"{SKIP}_{i}", part) for i, part in enumerate(several)]
        for count in range(skips + 1)
        for several in combinations_with_replacement(parts, count)
    )
    plans = (
        plan_step(segments, (*uncond, *isolation, COND, *skip), segment.expert)
        for skip in chosen
        for uncond in ((), (UNCOND,))
        for isolation in ((), (ISOLATION,))[: 1 + isolates]
    )
    return frozenset(len(run.passes) for plan in plans for run in plan.runs if run.segment == segment)


def full_plan(segments: Sequence[Segment], passes: Sequence[Pass]) -> StepPlan:
    """Every pass runs from the first segment on, nothing is shared: the reference for the shared plan."""
    ordered = in_order(passes)
    runs = (_perturbed(SegmentRun(segment, ordered)) for segment in blocks_of_expert(segments, 0))
    return StepPlan(ordered, tuple(runs), ordered)


def _whole_runs(segments: Sequence[Segment], passes: tuple[Pass, ...]) -> list[SegmentRun]:
    plain = tuple(one for one in passes if not one.is_skip)
    runs = [SegmentRun(segment, plain) for segment in segments if not segment.skipped]
    for one in passes:
        runs += [SegmentRun(s, (one,)) for s in segments if s.skipped and s.skipped == one.perturbation]
    return runs


def _shared_runs(segments: Sequence[Segment], passes: tuple[Pass, ...]) -> list[SegmentRun]:
    runs: list[SegmentRun] = []
    # Without cond there is no prefix to share.
    forked: tuple[Pass, ...] = () if COND in passes else tuple(one for one in passes if one.is_skip)
    for segment in segments:
        forks = tuple(one for one in passes if one not in forked and _perturbs(one, segment))
        forked += forks
        computed = tuple(one for one in passes if not one.is_skip or one in forked)
        runs.append(_perturbed(SegmentRun(segment, computed, forks)))
    return runs


def _perturbed(run: SegmentRun) -> SegmentRun:
    """The run as its passes change it."""
    changed = [one for one in run.passes if _perturbs(one, run.segment)]
    skipped = tuple(one for one in changed if one.perturbation and one.perturbation.mode == "stg-r")
    perturbed = tuple(one for one in changed if one not in skipped)
    if run.segment.stg_r_inside:
        return replace(run, perturbed=perturbed, reduced=skipped)
    computed = run.passes
    while computed and computed[-1] in skipped:
        computed = computed[:-1]
    return replace(run, passes=computed, bypassed=skipped, perturbed=perturbed)


def _perturbs(one: Pass, segment: Segment) -> bool:
    return not (segment.front or segment.back) and one.perturbs(segment.start)
