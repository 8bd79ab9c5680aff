"""`stg-trt bench foreign-engine`: the answer of whatever is there, word for word."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stg_trt.benchmarks import foreign_engine
from tests.support.cli import invoke


@pytest.mark.slow(reason="compiles engines with TensorRT-RTX")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which answers otherwise")
def test_the_answer_of_a_machine_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the wheel of TensorRT-RTX")
    output = tmp_path / "foreign-engine.json"
    answer = invoke("bench", "foreign-engine", f"--output={output}")
    assert answer.returncode == 0, answer.stderr
    result = json.loads(output.read_text())
    assert result["complete"] and result["target"] == "sm_80" and result["stages"] == ["device"]
    assert result["exit_status"] == 1 and "device: expected an NVIDIA GPU, got none" in result["answer"]
    assert result["answer"] in result["stderr"] and result["answer"] in answer.stdout


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (
            "import os, signal; print('load', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
            {"stages": ["load"], "exit_status": -11, "stderr": "", "answer": "no message"},
        ),
        (
            "print('load\\nrun'); print('ran, relative L2 1e-3')",
            {
                "stages": ["load", "run", "ran, relative L2 1e-3"],
                "exit_status": 0,
                "stderr": "",
                "answer": "ran, relative L2 1e-3",
            },
        ),
    ],
)
def test_a_crash_is_an_answer_too(
    monkeypatch: pytest.MonkeyPatch, program: str, expected: dict[str, Any]
) -> None:
    real = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: real([sys.executable, "-c", program], **options)
    )
    assert foreign_engine._asked("unused") == expected
