"""`stg-trt bench peers`: the same step by diffusers, and what is left out is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stg_trt.benchmarks import peers
from stg_trt.benchmarks.peers import PeersBenchmark
from stg_trt.benchmarks.scenario import Scenario
from stg_trt.errors import GateMissed, InvalidRequest
from tests.support.broken_plan import unperturbed
from tests.support.cli import invoke


def test_measures_eager_and_says_what_is_left_out(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    output = tmp_path / "peers.json"
    answer = invoke("bench", "peers", *tiny, "--peers=eager", "--rounds=2", f"--output={output}")
    assert answer.returncode == 0, answer.stderr
    result = json.loads(output.read_text())
    assert result["complete"] and result["left_out"] == ["compiled"]
    assert "left out by --peers: compiled" in answer.stdout
    assert result["timings"].keys() == result["verification"].keys() == {"stg_trt", "eager"}
    assert result["timings"]["stg_trt"]["gflop"] < result["timings"]["eager"]["gflop"]
    assert result["eager_over_stg_trt"] > 0
    for row in result["timings"].values():
        assert row["share_of_floor"] > 0 and row["peak_bytes"] >= 0


def test_measures_a_family_with_a_multi_step_solver(tmp_path: Path, tiny_wan: tuple[str, ...]) -> None:
    output = tmp_path / "peers.json"
    answer = invoke("bench", "peers", *tiny_wan, "--peers=eager", "--rounds=2", f"--output={output}")
    assert answer.returncode == 0, answer.stderr
    result = json.loads(output.read_text())
    assert result["complete"] and max(result["verification"]["eager"].values()) <= 1e-4


def test_torch_compile_is_one_of_them(
    tmp_path: Path, engines: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that changes nothing: the real one takes a minute on a CPU."""
    asked = {}

    def compiled(model: object, **options: object) -> object:
        asked.update(options)
        return model

    monkeypatch.setattr(peers.torch, "compile", compiled)
    PeersBenchmark(scenario, ("eager", "compiled"), "max-autotune", "segmented", 1).run(
        tmp_path / "peers.json", engines
    )
    result = json.loads((tmp_path / "peers.json").read_text())
    assert asked == {"mode": "max-autotune", "dynamic": False} and result["left_out"] == []
    assert result["compiled_over_stg_trt"] > 0 and result["compiled_first_run_s"] > 0


def test_a_broken_plan_is_not_timed(
    tmp_path: Path, engines: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "plan_step", unperturbed)
    with pytest.raises(GateMissed, match="stg_trt: expected skip within"):
        PeersBenchmark(scenario, ("eager",), "default", "segmented", 1).run(tmp_path / "peers.json", engines)


@pytest.mark.parametrize(("given", "got"), [(("xformers",), "got xformers"), ((), "got none")])
def test_unknown_peers(scenario: Scenario, given: tuple[str, ...], got: str) -> None:
    with pytest.raises(InvalidRequest, match=f"expected some of eager, compiled, {got}: correct them"):
        PeersBenchmark(scenario, given, "default", "segmented", 1)
