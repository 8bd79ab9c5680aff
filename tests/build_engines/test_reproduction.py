"""The lines of trtexec and Polygraphy in a manifest: by hand, as Polygraphy reads them, and run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stg_trt.build_engines.fused_attention import count_in_plan
from stg_trt.build_engines.reproduction import onnxruntime_command, tensorrt_commands
from stg_trt.build_engines.tensorrt_recipe import Recipe
from tests.support.tiny_graph import INPUT, write_graph

RECIPE = Recipe(
    graph=Path("work/back.onnx"),
    inputs=(INPUT,),
    profiles=((1, 1, 1), (2, 2, 2)),
    backend="tensorrt",
    target="this-gpu",
    builder_optimization_level=4,
    timing_cache=Path("engines/tensorrt-01234567.timings"),
)
RTX = Recipe(RECIPE.graph, (INPUT,), ((1, 2, 3),), "tensorrt-rtx", "sm_120")


def polygraphy(line: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Runs a line as a shell in that folder would, its program taken from this environment."""
    pytest.importorskip("polygraphy", reason="needs the extra verify")
    words = shlex.split(line)
    variables = [word for word in words[:1] if "=" in word]
    assert words[len(variables)] == "polygraphy"
    start = [sys.executable, "-c", "import sys; from polygraphy.tools import main; sys.exit(main())"]
    return subprocess.run(
        [*start, *words[len(variables) + 1 :], *more],
        cwd=folder,
        env=os.environ | dict(variable.split("=") for variable in variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_lines_for_tensorrt_by_hand() -> None:
    trtexec, run = tensorrt_commands(RECIPE)
    assert trtexec == (
        "trtexec --onnx=onnx/back.onnx --saveEngine=back.this-gpu.engine --skipInference --maxAuxStreams=0 "
        "--profilingVerbosity=detailed --stronglyTyped --builderOptimizationLevel=4 "
        "--timingCacheFile=../tensorrt-01234567.timings "
        "--profile=0 --minShapes=prompt_embeds:1x9x24 --optShapes=prompt_embeds:1x9x24 "
        "--maxShapes=prompt_embeds:1x9x24 "
        "--profile=1 --minShapes=prompt_embeds:2x9x24 --optShapes=prompt_embeds:2x9x24 "
        "--maxShapes=prompt_embeds:2x9x24"
    )
    assert run == (
        "polygraphy run onnx/back.onnx --trt --strongly-typed --max-aux-streams 0 "
        "--profiling-verbosity detailed --builder-optimization-level 4 "
        "--load-timing-cache ../tensorrt-01234567.timings "
        "--trt-min-shapes 'prompt_embeds:[1,9,24]' --trt-opt-shapes 'prompt_embeds:[1,9,24]' "
        "--trt-max-shapes 'prompt_embeds:[1,9,24]' "
        "--trt-min-shapes 'prompt_embeds:[2,9,24]' --trt-opt-shapes 'prompt_embeds:[2,9,24]' "
        "--trt-max-shapes 'prompt_embeds:[2,9,24]' "
        "--save-engine back.this-gpu.engine --input-shapes 'prompt_embeds:[1,9,24]'"
    )


def test_lines_for_tensorrt_rtx_by_hand() -> None:
    rtx, convert = tensorrt_commands(RTX)
    assert rtx == (
        "tensorrt_rtx --onnx=onnx/back.onnx --saveEngine=back.sm_120.engine --skipInference "
        "--maxAuxStreams=0 --profilingVerbosity=detailed --computeCapabilities=120 "
        "--minShapes=prompt_embeds:1x9x24 --optShapes=prompt_embeds:2x9x24 --maxShapes=prompt_embeds:3x9x24"
    )
    assert convert.startswith(
        "POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy convert onnx/back.onnx --convert-to trt "
        "--compute-capabilities 12.0 --strongly-typed "
    )
    assert "--compute-capabilities 8.9 " in tensorrt_commands(replace(RTX, target="sm_89"))[1]


def test_polygraphy_reads_the_line_for_tensorrt(tmp_path: Path) -> None:
    _, line = tensorrt_commands(RECIPE)
    (tmp_path / "onnx").mkdir()
    write_graph(tmp_path / "onnx" / "back.onnx")
    script = polygraphy(line, tmp_path, "--gen-script", "-")
    assert script.returncode == 0, script.stderr
    for rows in (1, 2):
        shape = [rows, 9, 24]
        assert f"Profile().add('prompt_embeds', min={shape}, opt={shape}, max={shape})" in script.stdout
    assert "builder_optimization_level=4" in script.stdout and "strongly_typed=True" in script.stdout


def test_the_line_for_tensorrt_rtx_builds_an_engine_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the wheel of TensorRT-RTX")
    _, line = tensorrt_commands(RTX)
    (tmp_path / "onnx").mkdir()
    write_graph(tmp_path / "onnx" / "back.onnx")
    built = polygraphy(line, tmp_path)
    assert built.returncode == 0, built.stderr
    engine = tmp_path / "back.sm_120.engine"
    assert engine.stat().st_size > 1000 and count_in_plan(engine) == 0


@pytest.mark.slow(reason="starts Polygraphy")
def test_the_line_for_onnxruntime_runs_the_graph(tmp_path: Path) -> None:
    line = onnxruntime_command(write_graph(tmp_path / "back.onnx"), (INPUT,), 3)
    assert line == (
        "polygraphy run back.onnx --onnxrt --providers cpu --input-shapes 'prompt_embeds:[3,9,24]'"
    )
    run = polygraphy(line, tmp_path)
    assert run.returncode == 0, run.stderr
    assert "text" in run.stdout and "PASSED" in run.stdout
