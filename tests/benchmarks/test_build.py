"""`stg-trt bench build`: what it records of every mode and layout, on fewer blocks."""

from __future__ import annotations

import json
from pathlib import Path

from stg_trt.benchmarks.report import write_report
from tests.support.cli import assert_one_line_error, invoke
from tests.support.family_cases import LTX

SIZE = [f"--{name.replace('_', '-')}={value}" for name, value in LTX.sizes.items()]
PLACE = ("--backend=onnxruntime", "--target=cpu", "--verify-timesteps=1", "--layouts=segmented")


def test_records_every_mode_and_fills_the_table(tmp_path: Path, model: Path) -> None:
    output = tmp_path / "build.json"
    options = ("--blocks=1", "--stg-blocks=0", "--stg-modes=stg-r,stg-a")
    answer = invoke("bench", "build", model, *SIZE, *PLACE, *options, f"--output={output}")
    assert answer.returncode == 0, answer.stderr
    result = json.loads(output.read_text())
    assert result["complete"] and result["blocks"] == [1]
    assert [build["stg_mode"] for build in result["builds"]] == ["stg-r", "stg-a"]
    for build in result["builds"]:
        assert build["fused_attentions"] == 2 and build["stg_blocks"] == [0]
        assert [segment["name"] for segment in build["segments"]] == ["text", "front", "block_0", "back"]
    write_report([output], tmp_path / "report.md", None)
    rows = [line for line in (tmp_path / "report.md").read_text().splitlines() if "stg-" in line]
    assert len(rows) == 2
    assert "32x2, 1 of its blocks | 160x128x17 fp32, 9 text tokens | stg-a 0 | segmented | cpu | " in rows[1]
    assert " | 2 of 2 | " in rows[1]


def test_blocks_that_are_not_there(tmp_path: Path, model: Path) -> None:
    options = ("--blocks=3", f"--output={tmp_path / 'build.json'}")
    result = invoke("bench", "build", model, *SIZE, *PLACE, *options)
    assert_one_line_error(result, "blocks: expected num_layers 1 to 2, got 3: write --blocks 2")
    assert not list(tmp_path.iterdir())
