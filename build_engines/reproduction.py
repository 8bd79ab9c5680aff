"""Commands of trtexec and Polygraphy that build and run a segment's graph as we do, for a closer look.

They are run in the build's folder, where `--keep-onnx` leaves the graphs.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from stg_trt.engines.tensorrt_library import PLUGINS, PROGRAMS
from stg_trt.models.tensor_spec import TensorSpec

from .tensorrt_recipe import Recipe

KEPT_GRAPHS = "onnx"
_SHAPES = ("min", "opt", "max")


def tensorrt_commands(recipe: Recipe) -> tuple[str, str]:
    """One line of trtexec, one of Polygraphy."""
    polygraphy = _polygraphy_rtx if recipe.backend == "tensorrt-rtx" else _polygraphy
    return shlex.join(_trtexec(recipe)), polygraphy(recipe)


def onnxruntime_command(graph: Path, inputs: Sequence[TensorSpec], rows: int) -> str:
    """One line of Polygraphy: ONNX Runtime runs the graph itself."""
    shapes = [_shape(spec, spec.with_rows(rows)) for spec in inputs]
    return shlex.join(
        ["polygraphy", "run", graph.name, "--onnxrt", "--providers", "cpu", "--input-shapes", *shapes]
    )


def _trtexec(recipe: Recipe) -> list[str]:
    words = [
        PROGRAMS[recipe.backend],
        f"--onnx={KEPT_GRAPHS}/{recipe.graph.name}",
        f"--saveEngine={recipe.engine.name}",
        "--skipInference",
        "--maxAuxStreams=0",
        "--profilingVerbosity=detailed",
    ]
    if recipe.backend == "tensorrt":
        # TensorRT 11 does this anyhow.
        words.append("--stronglyTyped")
    else:
        words.append(f"--computeCapabilities={recipe.target.removeprefix('sm_')}")
    if recipe.builder_optimization_level is not None:
        words.append(f"--builderOptimizationLevel={recipe.builder_optimization_level}")
    if recipe.timing_cache is not None:
        words.append(f"--timingCacheFile=../{recipe.timing_cache.name}")
    if recipe.plugins:
        words.append(f"--dynamicPlugins={PLUGINS}")
    for number, rows in enumerate(recipe.profiles):
        words += [f"--profile={number}"] if len(recipe.profiles) > 1 else []
        for place, kind in enumerate(_SHAPES):
            shapes = (
                f"{spec.name}:{'x'.join(map(str, spec.profile(rows)[place]))}" for spec in _with_rows(recipe)
            )
            words.append(f"--{kind}Shapes={','.join(shapes)}")
    return words


def _polygraphy(recipe: Recipe) -> str:
    """Builds, saves the engine and runs it once, on the rows of its first profile."""
    words = ["polygraphy", "run", f"{KEPT_GRAPHS}/{recipe.graph.name}", "--trt", "--strongly-typed"]
    words += _polygraphy_options(recipe)
    words += ["--save-engine", recipe.engine.name]
    inputs = [_shape(spec, spec.with_rows(recipe.profiles[0][1])) for spec in recipe.inputs]
    return shlex.join([*words, "--input-shapes", *inputs])


def _polygraphy_rtx(recipe: Recipe) -> str:
    """Only builds: `run` has no compute capabilities, and would need a GPU."""
    words = ["polygraphy", "convert", f"{KEPT_GRAPHS}/{recipe.graph.name}", "--convert-to", "trt"]
    major, minor = divmod(int(recipe.target.removeprefix("sm_")), 10)
    words += ["--compute-capabilities", f"{major}.{minor}", "--strongly-typed", *_polygraphy_options(recipe)]
    return f"POLYGRAPHY_USE_TENSORRT_RTX=1 {shlex.join([*words, '--output', recipe.engine.name])}"


def _polygraphy_options(recipe: Recipe) -> list[str]:
    words = ["--max-aux-streams", "0", "--profiling-verbosity", "detailed"]
    if recipe.builder_optimization_level is not None:
        words += ["--builder-optimization-level", str(recipe.builder_optimization_level)]
    if recipe.timing_cache is not None:
        words += ["--load-timing-cache", f"../{recipe.timing_cache.name}"]
    if recipe.plugins:
        words += ["--plugins", str(PLUGINS)]
    for rows in recipe.profiles:
        for place, kind in enumerate(_SHAPES):
            shapes = [_shape(spec, spec.profile(rows)[place]) for spec in _with_rows(recipe)]
            words += [f"--trt-{kind}-shapes", *shapes]
    return words


def _with_rows(recipe: Recipe) -> list[TensorSpec]:
    return [spec for spec in recipe.inputs if spec.row_axis is not None]


def _shape(spec: TensorSpec, shape: Sequence[int]) -> str:
    """As Polygraphy writes it: name:[2,60,8]."""
    return f"{spec.name}:[{','.join(map(str, shape))}]"
