"""The entry point: help at once, every program from the checkout, and one line for what is no refusal."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from stg_trt.cli.main import run_command
from tests.support.cli import (
    PROGRAM,
    ROOT,
    answer_of,
    assert_one_line_error,
    cpu_seconds_of_ended_children,
    invoke,
    run,
)


@pytest.mark.slow(reason="starts the program four times")
def test_help_answers_at_once_and_without_torch() -> None:
    seconds = []
    for _ in range(3):
        start_s = cpu_seconds_of_ended_children()
        answer = run("--help")
        seconds.append(cpu_seconds_of_ended_children() - start_s)
        assert answer.returncode == 0 and "generate" in answer.stdout and not answer.stderr
    assert min(seconds) < 1
    program = (
        f"import runpy, sys; sys.argv = ['stg-trt', 'build', '--help']; runpy.run_path({str(PROGRAM)!r})"
    )
    listing = f"import atexit, sys; atexit.register(lambda: print(sorted(sys.modules))); {program}"
    modules = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True
    ).stdout
    assert "'stg_trt.cli.main'" in modules
    assert not re.search(r"'(torch|numpy|onnx|diffusers|transformers)'", modules)


@pytest.mark.parametrize("program", ["build_engines", "runtime", "benchmarks"])
def test_programs_run_from_the_checkout(program: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"Usage: python -m {program}" in answer.stdout and not answer.stderr


def repeat(times: int) -> None:
    """Asks ONNX Runtime for as many numbers."""
    value, (float_, int_) = (
        onnx.helper.make_tensor_value_info,
        (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64),
    )
    node = onnx.helper.make_node("Expand", ["x", "shape"], ["y"])
    shapes = [value("x", float_, [1]), value("shape", int_, [1])]
    graph = onnx.helper.make_graph([node], "repeat", shapes, [value("y", float_, [None])])
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 20)])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    session.run(None, {"x": np.zeros(1, np.float32), "shape": np.array([times])})


@pytest.mark.parametrize(
    ("allocate", "pattern"),
    [
        (
            lambda: torch.empty(1 << 50),
            r"out of memory: .*can't allocate memory.* 4503599627370496 bytes.*: use",
        ),
        (
            lambda: bytearray(1 << 60),
            "out of memory: expected more free memory, got MemoryError: use fewer frames",
        ),
        (lambda: repeat(1 << 44), "out of memory: .*[Ff]ailed to allocate memory.*: use fewer frames"),
    ],
    ids=["torch", "Python", "ONNX Runtime"],
)
def test_out_of_memory(allocate: Callable[[], object], pattern: str) -> None:
    def command() -> None:
        allocate()

    assert_one_line_error(answer_of(lambda: run_command(command)), pattern)


def test_mistakes_before_a_command() -> None:
    assert_one_line_error(invoke("biuld"), "No such command 'biuld'.*: see stg-trt --help")
    assert_one_line_error(invoke("build"), "Missing argument .*: see stg-trt build --help")


@pytest.fixture
def log() -> Iterator[None]:
    """That of the library is as it was after the test."""
    library = logging.getLogger("stg_trt")
    handlers, level = library.handlers, library.level
    yield
    library.handlers = handlers
    library.setLevel(level)


def test_verbose_shows_the_librarys_log(
    tmp_path: Path, ltx_checkpoint: Path, ltx_engines: Path, embeds: Path, log: None
) -> None:
    steps = ("--num-inference-steps=4", "--embeds", embeds, "--output", tmp_path / "x.safetensors")
    command = (
        "generate",
        ltx_checkpoint,
        "--engines",
        ltx_engines,
        "--layout=twin",
        "--stg-mode=stg-r",
        "--stg-blocks=3",
        *steps,
    )
    (stages,) = invoke(*command).stderr.splitlines()
    assert re.fullmatch(r"load [\d.]+ s, denoise [\d.]+ s, encode [\d.]+ s: [\d.]+ s in all", stages)
    shown = invoke(*command, "--verbose")
    assert shown.returncode == 0, shown.stderr
    lines = re.sub(r"^\d\d:\d\d:\d\d stg_trt\.", "", shown.stderr, flags=re.MULTILINE).splitlines()
    patterns = (
        r"engines\.store: segmented-\S+ does not fit: layout is segmented, .*",
        r"engines\.store: twin-stg-r-\S+ fits",
        r"engines\.store: twin-\S+: 3 engines of 0\.\d\d GB loaded in .* s",
        r"runtime\.sampler: binding uncond\+cond\+skip",
    )
    for pattern in patterns:
        assert any(re.fullmatch(pattern, line) for line in lines), (pattern, lines)


def test_every_command_has_it() -> None:
    commands = (["build"], ["generate"], ["serve"], ["inspect"], ["verify"], ["doctor"], ["bench", "peers"])
    for command in commands:
        assert "--verbose" in invoke(*command, "--help").stdout, command
