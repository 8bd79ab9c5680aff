"""The gate before every timing: predictions against the uncut eager model in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stg_trt.errors import GateMissed
from stg_trt.runtime.device import Device

from .eager_step import EagerStep, lower_precision, perturbed_skip_row
from .scenario import Inputs, Scenario

# Float32 against float32: what is left is the order of summation.
_FLOAT32_LIMIT = 1e-4
# In a lower precision: as far as the eager model in that precision is, and half as much again.
_SLACK = 1.5
# How much of the exact step from cond to skip predictions have to show. Rounding, which may be longer than
# that step, has no part along it; other perturbations have little.
_LEAST_MOVED, _MOST_MOVED = 0.85, 1.15


@dataclass(frozen=True)
class Reference:
    """Eager float32 predictions (1, ...) of each pass, and the distance that is allowed."""

    preds: dict[str, Tensor]
    limits: dict[str, float]

    @classmethod
    def of_step(cls, scenario: Scenario, model: Any, inputs: Inputs, device: Device) -> Reference:
        """Runs the float32 `model` at the middle step; leaves it in the engines' precision."""
        dtype = getattr(torch, scenario.workload.dtype)
        exact = _preds(scenario, model, inputs, device, torch.float32)
        limits, lowered = dict.fromkeys(exact, allowed(None)), exact
        if dtype != torch.float32:
            lowered = _preds(scenario, lower_precision(model, dtype), inputs, device, dtype)
            limits = {group: allowed(distance(lowered[group], exact[group])) for group in exact}
        reference = cls(exact, limits)
        reference._check_perturbed(lowered)
        return reference

    def check(self, name: str, preds: dict[str, Tensor]) -> dict[str, float]:
        """Relative L2 of each pass; raises GateMissed, naming what was run, where one is too far off."""
        found = {group: distance(pred, self.preds[group]) for group, pred in preds.items()}
        for group, error in found.items():
            if not error <= self.limits[group]:
                raise GateMissed(
                    f"{name}: expected {group} within a relative L2 of {self.limits[group]:.1e} of the uncut "
                    f"eager model, got {error:.1e}: do not trust timings of it"
                )
        if "skip" in preds and not self._moved_alike(preds):
            raise GateMissed(
                f"{name}: expected skip as far from cond as the uncut eager model's, and in that direction, "
                f"got {self._moved(preds):.2f} of it: it perturbs something else; do not trust timings of it"
            )
        return found

    def _moved(self, preds: dict[str, Tensor]) -> float:
        """What the step from cond to skip has along the exact one, as a share of it."""
        step, exact = (p["skip"].double() - p["cond"].double() for p in (preds, self.preds))
        return float((step * exact).sum() / exact.square().sum())

    def _moved_alike(self, preds: dict[str, Tensor]) -> bool:
        return _LEAST_MOVED <= self._moved(preds) <= _MOST_MOVED

    def _check_perturbed(self, lowered: dict[str, Tensor]) -> None:
        """A perturbation that the eager model does not show in float32 or in the engines' precision."""
        step, limit = distance(self.preds["skip"], self.preds["cond"]), allowed(None)
        if not (step > limit and self._moved_alike(lowered)):
            raise GateMissed(
                f"eager: expected a skip row further from cond than {limit:.1e} and not lost in rounding, "
                f"got {step:.1e}: the check would see no difference; perturb other blocks"
            )


def load_model(scenario: Scenario, device: Device) -> Any:
    """The uncut diffusers transformer in float32 on the device, with the engines' random weights."""
    return scenario.opened.load_transformer().to(device.torch_device)


def allowed(lowered: float | None) -> float:
    """How far engines may be from eager float32; `lowered` is how far eager in their precision is."""
    return _FLOAT32_LIMIT if lowered is None else _SLACK * lowered


def distance(got: Tensor, wanted: Tensor) -> float:
    """Relative L2 in float64; infinite where anything is not finite."""
    a, b = got.double(), wanted.double()
    if not bool(torch.isfinite(a).all()):
        return float("inf")
    return float((a - b).norm() / b.norm())


def by_group(preds: Tensor, groups: Sequence[str]) -> dict[str, Tensor]:
    """Rows of one video by the name of their pass, copied."""
    return {group: pred.clone() for group, pred in zip(groups, preds.split(1), strict=True)}


def _preds(
    scenario: Scenario, model: Any, inputs: Inputs, device: Device, dtype: torch.dtype
) -> dict[str, Tensor]:
    with device.scope(), perturbed_skip_row(scenario, model):
        eager = EagerStep(scenario, model, inputs, dtype, device.torch_device)
        latents = inputs.noise.to(device.torch_device)
        return by_group(eager.preds(latents, inputs.middle), scenario.passes)
