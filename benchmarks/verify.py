"""The check before every timing: predictions against the eager diffusers model in float32.

A result that fails it is still measured, since time on a GPU may not come again, but marked as not to be
trusted; the report does not publish it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stg_trt.models.passes import Pass
from stg_trt.runtime.device import Device

from .eager_step import EagerStep, lower_precision, perturbed_skip_row
from .scenario import Inputs, Scenario

# Float32 against float32: what is left is the order of summation.
_FLOAT32_LIMIT = 1e-4
# In a lower precision: 1.5 times the error of the eager model in that precision.
_SLACK = 1.5
# How much of the exact step from cond to skip predictions have to show. Rounding, which may be longer than
# that step, has no part along it; other perturbations have little.
_LEAST_MOVED, _MOST_MOVED = 0.85, 1.15


@dataclass(frozen=True)
class Verdict:
    """Relative L2 of each pass, and why its timings cannot be trusted; no doubts if they can."""

    errors: dict[str, float]
    doubts: tuple[str, ...]

    def to_json(self) -> dict[str, float | None]:
        """The errors for a result; None if a prediction was not finite, which JSON cannot say."""
        return {name: finite_or_none(error) for name, error in self.errors.items()}


@dataclass(frozen=True)
class Reference:
    """Eager float32 predictions (1, ...) of each pass, and the relative L2 that is allowed for each.

    `doubts` says why nothing that is compared with it can be trusted; empty if it can.
    """

    preds: dict[str, Tensor]
    limits: dict[str, float]
    doubts: tuple[str, ...] = ()

    @classmethod
    def of_step(cls, scenario: Scenario, model: Any, inputs: Inputs, device: Device) -> Reference:
        """Runs the float32 `model` at the middle step; leaves it in the engines' precision."""
        dtype = getattr(torch, scenario.workload.dtype)
        exact = _preds(scenario, model, inputs, device, torch.float32)
        limits, lowered = dict.fromkeys(exact, limit_for(None)), exact
        if dtype != torch.float32:
            lowered = _preds(scenario, lower_precision(model, dtype), inputs, device, dtype)
            limits = {name: limit_for(relative_l2(lowered[name], exact[name])) for name in exact}
        return cls(exact, limits, cls(exact, limits).doubt_perturbation(lowered))

    def limits_to_json(self) -> dict[str, float | None]:
        """The limits for a result."""
        return {name: finite_or_none(limit) for name, limit in self.limits.items()}

    def check(self, name: str, preds: dict[str, Tensor]) -> Verdict:
        """Compares each pass; a doubt names what was run, and how far off it is."""
        errors = {found: relative_l2(pred, self.preds[found]) for found, pred in preds.items()}
        doubts = [
            f"{name}: expected {found} within a relative L2 of {self.limits[found]:.1e} of the eager "
            f"diffusers model, got {error:.1e}"
            for found, error in errors.items()
            if not error <= self.limits[found]
        ]
        if not doubts and "skip" in preds and not self._moved_alike(preds):
            doubts.append(
                f"{name}: expected skip as far from cond as the eager diffusers model's, and in that "
                f"direction, got {self._moved(preds):.2f} of it: it perturbs something else"
            )
        return Verdict(errors, tuple(doubts))

    def doubt_perturbation(self, lowered: dict[str, Tensor]) -> tuple[str, ...]:
        """A doubt if eager predictions do not show the perturbation, in float32 or in `lowered` precision."""
        if "skip" not in self.preds:
            return ()
        step, limit = relative_l2(self.preds["skip"], self.preds["cond"]), limit_for(None)
        if step > limit and self._moved_alike(lowered):
            return ()
        return (
            f"eager: expected a skip row further from cond than {limit:.1e} and not lost in rounding, got "
            f"{step:.1e}: the check would see no difference; perturb other blocks",
        )

    def _moved(self, preds: dict[str, Tensor]) -> float:
        """Projection of (skip - cond) onto the exact difference, as a fraction."""
        step, exact = (p["skip"].double() - p["cond"].double() for p in (preds, self.preds))
        return float((step * exact).sum() / exact.square().sum())

    def _moved_alike(self, preds: dict[str, Tensor]) -> bool:
        return _LEAST_MOVED <= self._moved(preds) <= _MOST_MOVED


def load_model(scenario: Scenario, device: Device) -> Any:
    """The diffusers transformer in float32 on the device, with the engines' random weights."""
    return scenario.opened.load_transformer().to(device.torch_device)


def limit_for(lowered: float | None) -> float:
    """How far engines may be from eager float32; `lowered` is how far eager in their precision is."""
    return _FLOAT32_LIMIT if lowered is None else _SLACK * lowered


def relative_l2(got: Tensor, wanted: Tensor) -> float:
    """In float64; infinite if anything is not finite."""
    a, b = got.double(), wanted.double()
    if not bool(torch.isfinite(a).all()):
        return math.inf
    return float((a - b).norm() / b.norm())


def finite_or_none(value: float) -> float | None:
    """A number for a result; JSON has neither infinity nor NaN."""
    return value if math.isfinite(value) else None


def rows_by_pass(preds: Tensor, passes: Sequence[Pass]) -> dict[str, Tensor]:
    """Rows of one video by the name of their pass, copied."""
    return {one.name: pred.clone() for one, pred in zip(passes, preds.split(1), strict=True)}


def _preds(
    scenario: Scenario, model: Any, inputs: Inputs, device: Device, dtype: torch.dtype
) -> dict[str, Tensor]:
    with device.scope(), perturbed_skip_row(scenario, model):
        eager = EagerStep(scenario, model, inputs, dtype, device.torch_device)
        latents = inputs.noise.to(device.torch_device)
        return rows_by_pass(eager.preds(latents, inputs.middle), scenario.passes)
