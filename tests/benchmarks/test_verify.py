"""The gate before every timing: a perturbation that changes less than rounding does must be seen too."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from stg_trt.benchmarks.scenario import Scenario
from stg_trt.benchmarks.verify import Reference, load_model, relative_l2
from tests.support.family_cases import COGVIDEOX

EXACT_STEP, ROUNDING = 6e-3, 1.4e-2


def noise(seed: int, scale: float) -> Tensor:
    return scale * torch.randn(1, 40_000, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def reference() -> Reference:
    """Of CogVideoX-2B's proportions: its joint attention under stg-a moves less than bfloat16 rounds."""
    cond = noise(0, 1.0)
    limits = {"cond": 1.5 * ROUNDING, "skip": 1.5 * ROUNDING}
    return Reference({"cond": cond, "skip": cond + noise(1, EXACT_STEP)}, limits)


def rounded(reference: Reference, step: Tensor | float) -> dict[str, Tensor]:
    """Predictions in a low precision, whose skip row differs from cond by `step`."""
    cond = reference.preds["cond"]
    return {"cond": cond + noise(2, ROUNDING), "skip": cond + step + noise(3, ROUNDING)}


def test_a_step_below_the_rounding_is_seen(reference: Reference) -> None:
    verdict = reference.check("shared", rounded(reference, noise(1, EXACT_STEP)))
    assert not verdict.doubts
    assert all(EXACT_STEP < error <= 1.5 * ROUNDING for error in verdict.errors.values())


@pytest.mark.parametrize(
    "step",
    [0.0, noise(4, EXACT_STEP), -noise(1, EXACT_STEP), 0.5 * noise(1, EXACT_STEP), 2 * noise(1, EXACT_STEP)],
    ids=["none", "another", "opposite", "half", "double"],
)
def test_a_wrong_step_below_the_rounding_is_doubted(reference: Reference, step: Tensor | float) -> None:
    preds = rounded(reference, step)
    errors = [relative_l2(preds[name], reference.preds[name]) for name in preds]
    assert max(errors) <= 1.5 * ROUNDING
    (doubt,) = reference.check("shared", preds).doubts
    assert re.match(r"shared: expected skip as far .* it perturbs something", doubt)


def test_a_reference_in_which_rounding_hides_the_step(reference: Reference) -> None:
    assert not reference.doubt_perturbation(rounded(reference, noise(1, EXACT_STEP)))
    for step in (0.0, noise(1, 0.1 * EXACT_STEP)):
        (doubt,) = reference.doubt_perturbation(rounded(reference, step))
        assert "not lost in rounding, got 6.0e-03: the check would see no difference" in doubt
    same = Reference(dict.fromkeys(("cond", "skip"), reference.preds["cond"]), reference.limits)
    (doubt,) = same.doubt_perturbation(same.preds)
    assert "got 0.0e+00: the check would see no difference" in doubt


@pytest.mark.parametrize("mode", ["stg-a", "stg-r"])
def test_a_lower_precision_on_the_cpu(mode: str) -> None:
    case = COGVIDEOX["2b"]
    scenario = Scenario(
        str(case.goldens),
        **case.sizes,
        stg_mode=mode,
        stg_blocks=(0,),
        backend="inductor",
        target="cpu",
        blocks=(1,),
        precision="bf16",
    )
    scenario.check()
    device = scenario.device()
    model = load_model(scenario, device)
    assert len(model.transformer_blocks) == 1
    reference = Reference.of_step(scenario, model, scenario.inputs(), device)
    assert all(1e-3 < limit < 0.1 for limit in reference.limits.values())
