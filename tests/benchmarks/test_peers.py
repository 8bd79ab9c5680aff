"""`stg-trt bench peers`: the same step by diffusers, and what is left out is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stg_trt.benchmarks import peer_models, peers
from stg_trt.benchmarks.peer_models import PEERS
from stg_trt.benchmarks.peers import PeersBenchmark
from stg_trt.benchmarks.scenario import Scenario
from stg_trt.errors import GateMissed, InvalidRequest
from tests.support.broken_plan import unperturbed
from tests.support.cli import invoke

ALL_BUT_EAGER = tuple(PEERS)[1:]


def test_measures_eager_and_says_what_is_left_out(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    output = tmp_path / "peers.json"
    answer = invoke("bench", "peers", *tiny, "--peers=eager", "--rounds=2", f"--output={output}")
    assert answer.returncode == 0, answer.stderr
    result = json.loads(output.read_text())
    assert result["complete"] and result["left_out"] == dict.fromkeys(ALL_BUT_EAGER, "not named by --peers")
    assert "left out: compiled: not named by --peers" in answer.stdout
    assert result["timings"].keys() == result["verification"].keys() == {"stg_trt", "eager"}
    assert result["timings"]["stg_trt"]["gflop"] < result["timings"]["eager"]["gflop"]
    assert result["eager_over_stg_trt"] > 0
    for row in result["timings"].values():
        assert row["roofline_ms"] > 0 and row["peak_bytes"] >= 0


def test_measures_a_family_with_a_multi_step_solver(tmp_path: Path, tiny_wan: tuple[str, ...]) -> None:
    output = tmp_path / "peers.json"
    answer = invoke("bench", "peers", *tiny_wan, "--peers=eager", "--rounds=2", f"--output={output}")
    assert answer.returncode == 0, answer.stderr
    result = json.loads(output.read_text())
    assert result["complete"] and max(result["verification"]["eager"].values()) <= 1e-4


def test_measures_cfg_alone(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    output = tmp_path / "peers.json"
    answer = invoke("bench", "peers", *tiny, "--no-stg", "--peers=eager", "--rounds=2", f"--output={output}")
    assert answer.returncode == 0, answer.stderr
    result = json.loads(output.read_text())
    assert result["trusted"] and result["passes"] == ["uncond", "cond"]
    assert result["verification"]["stg_trt"].keys() == {"uncond", "cond"}
    assert result["timings"]["stg_trt"]["gflop"] == result["timings"]["eager"]["gflop"]


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of torch.compile, which changes nothing here: a real one takes a minute on a CPU."""
    asked: list[dict[str, Any]] = []

    def compiled(model: object, **options: Any) -> object:
        asked.append(options)
        return model

    monkeypatch.setattr(peer_models.torch, "compile", compiled)
    return asked


def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    return result


@pytest.mark.slow(reason="times every peer")
def test_compilers_are_among_them(
    tmp_path: Path,
    engines: Path,
    scenario: Scenario,
    compilers: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", ModuleType("torch_tensorrt"))
    PeersBenchmark(scenario, tuple(PEERS), "segmented", 1).run(tmp_path / "peers.json", engines)
    result = read(tmp_path / "peers.json")
    assert compilers == [
        {"mode": "default", "dynamic": False},
        {"mode": "max-autotune", "dynamic": False},
        {"backend": "torch_tensorrt", "dynamic": False, "options": {"use_explicit_typing": True}},
    ]
    assert result["left_out"] == {} and result["timings"].keys() == {"stg_trt", *PEERS}
    for peer in PEERS:
        assert result[f"{peer}_over_stg_trt"] > 0 and result[f"{peer}_first_run_s"] >= 0


@pytest.mark.slow(reason="times two peers for each error")
@pytest.mark.parametrize("error", [ImportError("No module"), OSError("libnvinfer.so.10: no such file\nmore")])
def test_a_compiler_that_cannot_be_imported_is_left_out(
    tmp_path: Path, engines: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def no_module(name: str) -> None:
        raise error

    monkeypatch.setattr(peer_models, "import_module", no_module)
    PeersBenchmark(scenario, ("eager", "torch_tensorrt"), "segmented", 1).run(tmp_path / "p.json", engines)
    result = read(tmp_path / "p.json")
    reason = f"torch_tensorrt cannot be imported: {str(error).splitlines()[0]}"
    assert result["left_out"]["torch_tensorrt"] == reason
    assert result["complete"] and result["timings"].keys() == {"stg_trt", "eager"}


def test_a_peer_that_fails_or_errs_is_left_out(
    tmp_path: Path, engines: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are measured all the same."""

    def failing(model: object) -> object:
        raise ValueError("no kernel\nfor this")

    def wrong(model: Any) -> Any:
        return lambda **inputs: [2 * model(**inputs)[0]]

    monkeypatch.setitem(PEERS, "eager", failing)
    monkeypatch.setitem(PEERS, "compiled", wrong)
    monkeypatch.setitem(PEERS, "compiled_max_autotune", lambda model: model)
    PeersBenchmark(scenario, tuple(PEERS)[:3], "segmented", 1).run(tmp_path / "peers.json", engines)
    result = read(tmp_path / "peers.json")
    assert result["left_out"]["eager"] == "ValueError: no kernel for this"
    assert result["left_out"]["compiled"].startswith(
        "compiled: expected uncond within a relative L2 of 1.0e-04"
    )
    assert result["trusted"] and result["timings"].keys() == {"stg_trt", "compiled_max_autotune"}


def test_a_broken_plan_is_timed_but_not_trusted(
    tmp_path: Path, engines: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "plan_step", unperturbed)
    with pytest.raises(GateMissed, match="stg_trt: expected skip within"):
        PeersBenchmark(scenario, ("eager",), "segmented", 1).run(tmp_path / "peers.json", engines)
    result = read(tmp_path / "peers.json")
    assert result["complete"] and not result["trusted"] and result["eager_over_stg_trt"] > 0


@pytest.mark.parametrize(("given", "got"), [(("xformers",), "got xformers"), ((), "got none")])
def test_unknown_peers(scenario: Scenario, given: tuple[str, ...], got: str) -> None:
    with pytest.raises(InvalidRequest, match=f"expected some of eager, .*, {got}: correct them"):
        PeersBenchmark(scenario, given, "segmented", 1)
