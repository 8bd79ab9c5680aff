"""The command line of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .scenario import Scenario

bench = typer.Typer(no_args_is_help=True, help="Verify, then time, then record as JSON.")

Output = Annotated[Path, typer.Option(help="JSON file of the results.")]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        help="A published configuration, or a folder; weights are random. [default: 12 blocks of width 512]"
    ),
]
Height = Annotated[int, typer.Option(help="Pixels.")]
Width = Annotated[int, typer.Option(help="Pixels.")]
Frames = Annotated[int, typer.Option(help="Frames.")]
TextLength = Annotated[int | None, typer.Option(help="Text tokens. [default: the family's]")]
Mode = Annotated[str, typer.Option(help="stg-a or stg-r.")]
Blocks = Annotated[
    str | None, typer.Option(help="Perturbed blocks, such as 19. [default: 8, or the family's]")
]
PerturbableBlocks = Annotated[str | None, typer.Option(help="Perturbable blocks. [default: the family's]")]
VerifyTimesteps = Annotated[int, typer.Option(help="Timesteps compared with eager float32.")]
BackendName = Annotated[str, typer.Option(help="Compiles and runs the engines.")]
TargetName = Annotated[str | None, typer.Option(help="Where the engines run. [default: the backend's]")]
ModelBlocks = Annotated[
    str | None, typer.Option(help="How many blocks, one number per list of them. [default: all]")
]
PrecisionName = Annotated[str | None, typer.Option(help="fp32, bf16 or fp8. [default: the target's first]")]
Layout = Annotated[str, typer.Option(help="segmented or twin.")]
Rounds = Annotated[int, typer.Option(help="Alternating rounds after the warm-up.", min=1)]
Engines = Annotated[
    Path | None, typer.Option(help="Folder to keep the engines in, or to take them from. [default: none]")
]


@bench.callback()
def _group() -> None:
    """Benchmarks of the engines."""


@bench.command()
def build(
    checkpoint: Annotated[str, typer.Argument(help="A published configuration, or a folder.")],
    output: Output,
    height: Height,
    width: Width,
    num_frames: Frames,
    text_length: TextLength = None,
    stg_blocks: PerturbableBlocks = None,
    stg_modes: Annotated[
        str | None, typer.Option(help="Modes to build, such as stg-r,stg-a. [default: the family's]")
    ] = None,
    layouts: Annotated[str, typer.Option(help="Layouts to build.")] = "segmented,twin",
    blocks: ModelBlocks = None,
    backend: Annotated[str, typer.Option(help="Compiles the engines.")] = "tensorrt-rtx",
    target: Annotated[str, typer.Option(help="Compute capabilities.")] = "sm_120,sm_89",
    verify_timesteps: VerifyTimesteps = 1,
    precision: PrecisionName = None,
    engines: Annotated[Path | None, typer.Option(help="Folder to keep the engines in.")] = None,
) -> None:
    """Compile a model with random weights: seconds, peak memory, engine bytes, fused attentions."""
    from stg_trt.models.perturbation import parse_blocks

    from .build import BuildBenchmark

    BuildBenchmark(
        checkpoint=checkpoint,
        height=height,
        width=width,
        num_frames=num_frames,
        text_length=text_length,
        stg_blocks=parse_blocks(stg_blocks),
        stg_modes=(None,) if stg_modes is None else _modes(stg_modes),
        blocks=parse_blocks(blocks, "blocks", "3"),
        layouts=_layouts(layouts),
        backend=backend,
        target=target,
        verify_timesteps=verify_timesteps,
        precision=precision,
    ).run(output, engines)


@bench.command()
def rebuild(
    checkpoint: Annotated[str, typer.Argument(help="A published configuration, or a folder.")],
    output: Output,
    height: Height,
    width: Width,
    num_frames: Frames,
    text_length: TextLength = None,
    stg_blocks: PerturbableBlocks = None,
    blocks: ModelBlocks = None,
    backend: BackendName = "onnxruntime",
    target: TargetName = None,
    verify_timesteps: VerifyTimesteps = 3,
    rounds: Annotated[int, typer.Option(help="Builds of each kind, by turns.", min=1)] = 2,
) -> None:
    """Time a build with other random weights: beside a finished build of the model, and alone."""
    from stg_trt.models.perturbation import parse_blocks

    from .rebuild import RebuildBenchmark

    RebuildBenchmark(
        checkpoint=checkpoint,
        height=height,
        width=width,
        num_frames=num_frames,
        text_length=text_length,
        blocks=parse_blocks(blocks, "blocks", "3"),
        stg_blocks=parse_blocks(stg_blocks),
        backend=backend,
        target=target,
        verify_timesteps=verify_timesteps,
        rounds=rounds,
    ).run(output)


@bench.command()
def step(
    output: Output,
    checkpoint: Checkpoint = None,
    height: Height = 512,
    width: Width = 512,
    num_frames: Frames = 25,
    text_length: TextLength = None,
    stg_mode: Mode = "stg-a",
    stg_blocks: Blocks = None,
    backend: BackendName = "onnxruntime",
    target: TargetName = None,
    blocks: ModelBlocks = None,
    precision: PrecisionName = None,
    layouts: Annotated[str, typer.Option(help="Layouts to compare.")] = "segmented,twin",
    rounds: Rounds = 20,
    engines: Engines = None,
) -> None:
    """Time a CFG+STG step with the shared prefix against full passes, twins and CFG; graph on and off."""
    size = (height, width, num_frames, text_length)
    scenario = _scenario(checkpoint, size, stg_mode, stg_blocks, backend, target, blocks, precision)
    from .step import StepBenchmark

    StepBenchmark(scenario, _layouts(layouts), rounds).run(output, engines)


@bench.command()
def sample(
    output: Output,
    checkpoint: Checkpoint = None,
    height: Height = 512,
    width: Width = 512,
    num_frames: Frames = 25,
    text_length: TextLength = None,
    stg_mode: Mode = "stg-a",
    stg_blocks: Blocks = None,
    backend: BackendName = "onnxruntime",
    target: TargetName = None,
    blocks: ModelBlocks = None,
    precision: PrecisionName = None,
    layout: Layout = "segmented",
    num_inference_steps: Annotated[
        int | None, typer.Option(help="Denoising steps. [default: the family's]", min=2)
    ] = None,
    rounds: Rounds = 3,
    engines: Engines = None,
) -> None:
    """Time whole sampling calls: in all, per step by guidance state, and what the loop adds."""
    size = (height, width, num_frames, text_length)
    scenario = _scenario(checkpoint, size, stg_mode, stg_blocks, backend, target, blocks, precision)
    from .sample import SampleBenchmark

    _layouts(layout)
    SampleBenchmark(scenario, layout, num_inference_steps, rounds).run(output, engines)


@bench.command()
def peers(
    output: Output,
    checkpoint: Checkpoint = None,
    height: Height = 512,
    width: Width = 512,
    num_frames: Frames = 25,
    text_length: TextLength = None,
    stg_mode: Mode = "stg-a",
    stg_blocks: Blocks = None,
    backend: BackendName = "onnxruntime",
    target: TargetName = None,
    blocks: ModelBlocks = None,
    precision: PrecisionName = None,
    layout: Layout = "segmented",
    peers: Annotated[
        str, typer.Option(help="Who takes part; the others are recorded as left out.")
    ] = "eager,compiled,compiled_max_autotune,torch_tensorrt",
    stg: Annotated[bool, typer.Option(help="With the skip pass, or CFG alone.")] = True,
    rounds: Rounds = 20,
    engines: Engines = None,
) -> None:
    """Time a CFG+STG step against diffusers' transformer: eager, and as compilers make it."""
    from dataclasses import replace

    size = (height, width, num_frames, text_length)
    scenario = _scenario(checkpoint, size, stg_mode, stg_blocks, backend, target, blocks, precision)
    from .peers import PeersBenchmark

    scenario = replace(scenario, stg=stg)

    _layouts(layout)
    PeersBenchmark(scenario, tuple(peers.split(",")), layout, rounds).run(output, engines)


@bench.command()
def kernels(
    output: Output,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. [default: cuda where there is a GPU]")
    ] = None,
    elements: Annotated[
        str | None,
        typer.Option(help="Latent elements of a video. [default: LTX-Video 704x480x121, and a large one]"),
    ] = None,
    rounds: Rounds = 50,
) -> None:
    """Time the kernels of a step against a copy of as many bytes."""
    import torch

    from .kernels import LTX_ELEMENTS, KernelBenchmark

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    large = 1 << (26 if chosen == "cuda" else 20)
    sizes = (LTX_ELEMENTS, large) if elements is None else _elements(elements)
    KernelBenchmark(chosen, sizes, rounds).run(output)


@bench.command()
def serve(
    checkpoint: Annotated[str, typer.Argument(help="The checkpoint that the engines were built from.")],
    engines: Annotated[Path, typer.Option(help="A folder made by stg-trt build.")],
    output: Output,
    prompt: Annotated[str, typer.Option(help="Of all videos; each has a seed of its own.")] = "a red fox",
    num_inference_steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
    minutes: Annotated[float, typer.Option(help="How long clients ask.", min=0.01, max=60)] = 10,
    clients: Annotated[int, typer.Option(help="Who ask at once.", min=1, max=64)] = 12,
) -> None:
    """Load a server on this machine: videos, queue times, lost jobs, memory over time."""
    from .serve import ServeBenchmark

    ServeBenchmark(checkpoint, engines, prompt, num_inference_steps, minutes, clients).run(output)


@bench.command(name="foreign-engine")
def foreign_engine(output: Output) -> None:
    """Build a TensorRT-RTX engine for SM 8.0, try it on the GPU that is here, record the exact answer."""
    from .foreign_engine import try_foreign_engine

    try_foreign_engine(output)


@bench.command()
def gpu(
    output: Annotated[Path, typer.Option(help="Folder of the JSON files.")],
    minutes: Annotated[float, typer.Option(help="Time for everything.")] = 9,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a rehearsal with small models.")] = "cuda",
    backend: Annotated[
        str | None, typer.Option(help="Compiles and runs the engines. [default: the device's]")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Words of the parts' names: cogvideox,wan. [default: all parts]")
    ] = None,
) -> None:
    """Everything that needs a GPU, most valuable first; what is done when the time is up is kept."""
    from stg_trt.errors import InvalidRequest
    from stg_trt.runtime.device import open_device

    from .gpu import bench_gpu
    from .gpu_plan import SCALES

    if device not in SCALES:
        raise InvalidRequest(f"device: expected one of {', '.join(SCALES)}, got {device!r}: use cuda")
    open_device(device)
    bench_gpu(output, minutes, SCALES[device], backend, only)


@bench.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="JSON files of results.")],
    output: Annotated[Path, typer.Option(help="Markdown file; the plot gets its name with .png.")],
    reasons: Annotated[
        Path | None, typer.Option(help="JSON object: why a goal was missed, by the goal's name.")
    ] = None,
) -> None:
    """Write results as Markdown tables and a plot."""
    from .report import write_report

    for path in write_report(results, output, reasons):
        print(path)


def _scenario(
    checkpoint: str | None,
    size: tuple[int, int, int, int | None],
    stg_mode: str,
    stg_blocks: str | None,
    backend: str,
    target: str | None,
    blocks: str | None,
    precision: str | None,
) -> Scenario:
    """The options that step, sample and peers share."""
    from stg_trt.engines.backends import backend_for
    from stg_trt.models.perturbation import check_mode, parse_blocks

    # Checks that need no torch come first: its import takes seconds.
    check_mode(stg_mode)
    backend_for(backend)
    perturbed, kept = parse_blocks(stg_blocks), parse_blocks(blocks, "blocks", "3")
    from .scenario import Scenario

    return Scenario(
        checkpoint,
        *size,
        stg_mode=stg_mode,
        stg_blocks=perturbed,
        backend=backend,
        target=target,
        blocks=kept,
        precision=precision,
    )


def _elements(text: str) -> tuple[int, ...]:
    """Numbers separated by commas; raises InvalidRequest for anything else."""
    from stg_trt.errors import InvalidRequest

    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 1 for word in words):
        raise InvalidRequest(
            f"elements: expected numbers above 1 separated by commas, got {text!r}: write 675840,67108864"
        )
    return tuple(map(int, words))


def _modes(text: str) -> tuple[str, ...]:
    """Modes separated by commas; raises InvalidRequest for an unknown one."""
    from stg_trt.models.perturbation import check_mode

    modes = tuple(text.split(","))
    for mode in modes:
        check_mode(mode)
    return modes


def _layouts(text: str) -> tuple[Any, ...]:
    """Layouts separated by commas; raises InvalidRequest for an unknown one."""
    from stg_trt.models.segment import check_layout

    layouts = tuple(text.split(","))
    for layout in layouts:
        check_layout(layout)
    return layouts
