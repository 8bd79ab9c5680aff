"""A server under load for a few seconds, and faults that a result must not hide."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stg_trt.benchmarks.serve import ServeBenchmark, Served
from stg_trt.errors import GateMissed
from tests.conftest import BuiltOnce
from tests.support.family_cases import LTX, FamilyCase
from tests.support.whole_pipelines import PROMPTS


@pytest.mark.slow(reason="starts a server in a process of its own")
def test_a_short_load(
    built_once: BuiltOnce, whole_engines: Callable[[FamilyCase, Path], Path], tmp_path: Path
) -> None:
    checkpoint = built_once(f"{LTX}-whole-checkpoint", LTX.save_pipeline)
    output = tmp_path / "serve.json"
    load = ServeBenchmark(str(checkpoint), whole_engines(LTX, checkpoint), PROMPTS[0], 2, 0.1, 10)
    load.run(output)
    result = json.loads(output.read_text())
    assert result["complete"] and result["trusted"] and result["benchmark"] == "serve"
    assert result["videos"] >= 3 and (result["lost"], result["failed"]) == (0, 0)
    assert 0 < result["queued_median_ms"] <= result["whole_median_ms"]
    assert result["refused_for_a_full_queue"] > 0 and result["memory_mib"]["late"] > 100


@pytest.mark.parametrize(
    ("lost", "statuses", "memory", "doubt"),
    [
        (1, ["completed"], [100] * 12, "1 jobs lost, 0 failed, 1 ended"),
        (0, ["completed", "failed"], [100] * 12, "0 jobs lost, 1 failed, 2 ended"),
        (0, [], [100] * 12, "0 jobs lost, 0 failed, 0 ended"),
        (0, ["completed"], [50, 90, *[100] * 8, 120, 120], r"memory grew by .* %"),
    ],
)
def test_faults_are_doubts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lost: int,
    statuses: list[str],
    memory: list[int],
    doubt: str,
) -> None:
    load = ServeBenchmark("none", tmp_path, "a", 1, 1, 0)
    load._lost = lost
    load._served = [Served(status, 0.1, 0.2) for status in statuses]
    monkeypatch.setattr(load, "_server", lambda data: _Nothing())
    monkeypatch.setattr(load, "_watch", lambda process, end: memory)
    with pytest.raises(GateMissed, match=doubt):
        load.run(tmp_path / "serve.json")


class _Nothing:
    def __enter__(self) -> tuple[None, str]:
        return None, ""

    def __exit__(self, *error: object) -> None:
        pass
