"""`stg-trt bench sample`: whole calls, steps by guidance state, and the loop around them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stg_trt.benchmarks.sample import SampleBenchmark
from stg_trt.benchmarks.scenario import Scenario
from stg_trt.errors import GateMissed
from tests.support.broken_plan import unperturbed
from tests.support.cli import invoke
from tests.support.family_cases import COGVIDEOX, WAN, FamilyCase
from tests.support.scenarios import scenario_of

CALLS = {"stg", "stg in the middle", "cfg"}
CFG, STG = "uncond+cond, rescaled", "uncond+cond+skip, rescaled"


def test_measures_calls_and_their_steps(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    output = tmp_path / "sample.json"
    answer = invoke("bench", "sample", *tiny, "--num-inference-steps=8", "--rounds=2", f"--output={output}")
    assert answer.returncode == 0, answer.stderr
    result = json.loads(output.read_text())
    assert result["complete"] and result["steps"] == 8
    assert result["verification"]["relative_l2"] <= result["verification"]["limit"] == 1e-4
    counts = {
        name: {state: steps["count"] for state, steps in call["steps"].items()}
        for name, call in result["calls"].items()
    }
    assert counts == {"stg": {STG: 8}, "stg in the middle": {CFG: 4, STG: 4}, "cfg": {CFG: 8}}
    assert result["step_alone_ms"].keys() == {CFG, STG}
    for call in result["calls"].values():
        assert call["total"]["median_ms"] > 0 and call["overhead"] < 1 and call["loop_overhead"] < 1
    assert "loop overhead" in answer.stdout


@pytest.mark.slow(reason="exports the graphs of two more families")
@pytest.mark.parametrize("case", [WAN, COGVIDEOX["5b"]], ids=str)
def test_a_multi_step_solver(tmp_path: Path, engines: Path, case: FamilyCase) -> None:
    """Of which one adds noise."""
    scenario = scenario_of(case, "stg-a", (2,))
    SampleBenchmark(scenario, "segmented", 4, 1).run(tmp_path / "sample.json", engines)
    result = json.loads((tmp_path / "sample.json").read_text())
    assert result["complete"] and result["verification"]["relative_l2"] <= 1e-4


def test_a_broken_plan_is_timed_but_not_trusted(
    tmp_path: Path, engines: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stg_trt.runtime.sampler.plan_step", unperturbed)
    with pytest.raises(GateMissed, match=r"sample: expected latents within .* after 2 steps, got"):
        SampleBenchmark(scenario, "segmented", 4, 1).run(tmp_path / "sample.json", engines)
    result = json.loads((tmp_path / "sample.json").read_text())
    assert result["complete"] and not result["trusted"] and result["calls"].keys() == CALLS
