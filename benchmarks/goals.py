"""Goals for the step on a data-centre GPU, and whether results reach them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]

_MODEL = "ltx-video-2b"
_SIZE = {"height": 480, "width": 704, "num_frames": 121, "precision": "bf16"}


@dataclass(frozen=True)
class Goal:
    """One number of one benchmark and its bound."""

    name: str
    benchmark: str
    read: Callable[[Result], float | None]
    bound: float
    at_most: bool
    of_model: bool = True

    def applies(self, result: Result) -> bool:
        """Whether the result is of this benchmark, on a GPU, and of the whole model at the size meant."""
        if result["benchmark"] != self.benchmark or result.get("gpu") is None:
            return False
        workload = result.get("workload", {})
        sized = all(workload.get(name) == value for name, value in _SIZE.items())
        return not self.of_model or (result.get("model") == _MODEL and not result.get("blocks") and sized)

    def is_met(self, value: float) -> bool:
        """Whether a measured value is within the bound."""
        return value <= self.bound if self.at_most else value >= self.bound


@dataclass(frozen=True)
class Outcome:
    """A goal, and the result that it applies to."""

    goal: Goal
    result: Result

    @property
    def value(self) -> float | None:
        """The measured value; None if the result lacks it, or is not trusted."""
        return self.goal.read(self.result) if is_trusted(self.result) else None


def find_outcomes(results: Sequence[Result]) -> list[Outcome]:
    """Every goal for every result that it applies to."""
    return [Outcome(goal, result) for goal in GOALS for result in results if goal.applies(result)]


def is_trusted(result: Result) -> bool:
    """Whether the predictions of what was timed were right."""
    trusted: bool = result.get("trusted", True)
    return trusted


def _overhead(result: Result) -> float | None:
    value: float | None = result.get("calls", {}).get("stg", {}).get("loop_overhead")
    return value


def _share_of_copy(result: Result) -> float | None:
    rows = [row for row in result["kernels"] if row["name"] == "guided_step"]
    share: float | None = max(rows, key=lambda row: row["elements"])["share_of_copy"] if rows else None
    return share


def _copies_of_weights(result: Result) -> float | None:
    segmented = result.get("layouts", {}).get("segmented")
    return segmented["weight_bytes"] / result["model_bytes"] if segmented else None


GOALS = (
    Goal("STG step / CFG step", "step", lambda r: r.get("stg_over_cfg"), 1.18, True),
    Goal("torch.compile / stg_trt", "peers", lambda r: r.get("compiled_over_stg_trt"), 1.25, False),
    Goal("diffusers eager / stg_trt", "peers", lambda r: r.get("eager_over_stg_trt"), 1.7, False),
    Goal("loop beyond its steps, of a call", "sample", _overhead, 0.02, True),
    Goal("guided_step, share of copy bandwidth", "kernels", _share_of_copy, 0.7, False, of_model=False),
    Goal("engine bytes / model bytes", "step", _copies_of_weights, 1.05, True),
)
