"""The command line of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(no_args_is_help=True, help="Verify, then time, then record as JSON.")


@bench.callback()
def _group() -> None:
    """Benchmarks of the engines."""


@bench.command()
def build(
    checkpoint: Annotated[str, typer.Argument(help="A published configuration, or a folder.")],
    output: Annotated[Path, typer.Option(help="JSON file of the results.")],
    height: Annotated[int, typer.Option(help="Pixels.")],
    width: Annotated[int, typer.Option(help="Pixels.")],
    num_frames: Annotated[int, typer.Option(help="Frames.")],
    text_length: Annotated[int, typer.Option(help="Text tokens.")] = 128,
    stg_blocks: Annotated[
        str | None, typer.Option(help="Perturbable blocks. [default: the family's]")
    ] = None,
    layouts: Annotated[str, typer.Option(help="Layouts to build.")] = "segmented,twin",
    backend: Annotated[str, typer.Option(help="What compiles.")] = "tensorrt-rtx",
    target: Annotated[str, typer.Option(help="Compute capabilities.")] = "sm_120,sm_89",
    verify_timesteps: Annotated[int, typer.Option(help="Timesteps compared with eager float32.")] = 1,
    engines: Annotated[Path | None, typer.Option(help="Folder to keep the engines in.")] = None,
) -> None:
    """Compile a model with random weights: seconds, peak memory, engine bytes, fused attentions."""
    from stg_trt.perturbation import parse_blocks

    from .build import BuildBenchmark

    BuildBenchmark(
        checkpoint=checkpoint,
        height=height,
        width=width,
        num_frames=num_frames,
        text_length=text_length,
        stg_blocks=None if stg_blocks is None else tuple(parse_blocks(stg_blocks)),
        layouts=tuple(layouts.split(",")),
        backend=backend,
        target=target,
        verify_timesteps=verify_timesteps,
    ).run(output, engines)


@bench.command()
def step(
    output: Annotated[Path, typer.Option(help="JSON file of the results.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="A folder; its weights are random. [default: 12 blocks of width 512]")
    ] = None,
    height: Annotated[int, typer.Option(help="Pixels.")] = 512,
    width: Annotated[int, typer.Option(help="Pixels.")] = 512,
    num_frames: Annotated[int, typer.Option(help="Frames.")] = 25,
    text_length: Annotated[int, typer.Option(help="Text tokens.")] = 128,
    stg_blocks: Annotated[str, typer.Option(help="Perturbed blocks.")] = "8",
    rounds: Annotated[int, typer.Option(help="Alternating rounds after the warm-up.")] = 20,
    engines: Annotated[Path | None, typer.Option(help="Folder to keep the engines in.")] = None,
) -> None:
    """Time a CFG+STG step with the shared prefix against all passes in full, and against CFG."""
    from stg_trt.perturbation import parse_blocks

    from .step import StepBenchmark

    StepBenchmark(
        checkpoint=checkpoint,
        height=height,
        width=width,
        num_frames=num_frames,
        text_length=text_length,
        stg_blocks=tuple(parse_blocks(stg_blocks)),
        rounds=rounds,
    ).run(output, engines)
