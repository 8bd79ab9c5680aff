"""`stg-trt bench rebuild`: other weights beside a finished build take its graphs, and alone they do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.cli import invoke
from tests.support.family_cases import LTX

SIZE = [f"--{name.replace('_', '-')}={value}" for name, value in LTX.sizes.items()]


@pytest.mark.slow(reason="builds in processes of their own")
def test_it_times_both_and_says_what_was_reused(tmp_path: Path, model: Path) -> None:
    output = tmp_path / "rebuild.json"
    options = ("--blocks=1", "--stg-blocks=0", "--verify-timesteps=1", "--rounds=1", f"--output={output}")
    answer = invoke("bench", "rebuild", model, *SIZE, *options)
    assert answer.returncode == 0, answer.stderr
    result = json.loads(output.read_text())
    assert result["complete"] and result["trusted"]
    (entry,) = result["rounds"]
    segments = ["text", "front", "block_0", "back"]
    assert entry["beside"]["reused"] == {key: ["graph"] for key in segments}
    assert entry["alone"]["reused"] == {key: [] for key in segments}
    assert entry["alone"]["stages_s"]["export"] > entry["beside"]["stages_s"]["export"]
    assert entry["alone"]["engine_bytes"] == entry["beside"]["engine_bytes"] > 0
    assert "beside " in answer.stdout
