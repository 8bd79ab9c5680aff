"""The command line of the build."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .sizes import choose_sizes

StgBlocks = Annotated[
    list[str] | None,
    typer.Option(
        help="Blocks to perturb, as 14,19; or spatial=14, again for each pass. [default: the family's]"
    ),
]
Precision = Annotated[str | None, typer.Option(help="fp32, bf16 or fp8. [default: what the backend runs]")]
BackendName = Annotated[str, typer.Option(help="onnxruntime, tensorrt-rtx, tensorrt, inductor, or auto.")]
TargetNames = Annotated[
    str | None, typer.Option(help="Such as sm_120,sm_89, this-gpu or cpu. [default: the backend's]")
]
Plugins = Annotated[str, typer.Option(help="Kernels of ours inside TensorRT engines, such as qk_norm_rope.")]

Variant = Annotated[str | None, typer.Option(help="The word in the names of weight files, such as fp16.")]
LoraFiles = Annotated[
    list[str] | None, typer.Option("--lora", help="FILE or FILE:SCALE, merged into the weights; repeat it.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub. [default: main]")]
OptimizationLevel = Annotated[
    int | None, typer.Option(help="TensorRT's, 0 to 5: build longer, run faster. [default: its own, 3]")
]
Refittable = Annotated[
    bool, typer.Option("--refittable", help="TensorRT engines that builds with other weights refit.")
]
SegmentSize = Annotated[
    float | None, typer.Option(help="Most weights of an engine. [default: what this machine can compile]")
]
ConditionFrames = Annotated[
    int, typer.Option(help="Latent frames of pictures for later frames: 1 for a picture, 2 for a video.")
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Seeded random weights, for benchmarks.")
]
CalibrationPrompts = Annotated[
    Path | None, typer.Option(help="To calibrate fp8: a file with a prompt per line. [default: eight]")
]
CalibrationSteps = Annotated[
    int | None, typer.Option(help="To calibrate fp8: steps of each prompt. [default: 8]")
]
Timesteps = Annotated[int, typer.Option(help="To verify: 3 is first, middle, last; 0 is none.")]
Sizes = Annotated[
    str | None, typer.Option(help="Instead of the three: 704x480x121,1216x704x121, width, height, frames.")
]
FrameRate = Annotated[
    float | None, typer.Option(help="Frames per second, of a model with sound. [default: the family's]")
]


def build(
    checkpoint: Annotated[str, typer.Argument(help="A diffusers folder, a hub id, or a published name.")],
    output: Annotated[Path, typer.Option(help="Folder for the engines; several builds may share it.")],
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of the video.")] = None,
    sizes: Sizes = None,
    text_length: Annotated[int | None, typer.Option(help="Text tokens. [default: the family's]")] = None,
    condition_frames: ConditionFrames = 0,
    frame_rate: FrameRate = None,
    stg_blocks: StgBlocks = None,
    stg_mode: Annotated[str | None, typer.Option(help="stg-a or stg-r. [default: the family's]")] = None,
    layout: Annotated[str, typer.Option(help="segmented or twin.")] = "segmented",
    precision: Precision = None,
    max_batch: Annotated[int, typer.Option(help="Most videos in one call.")] = 1,
    backend: BackendName = "onnxruntime",
    target: TargetNames = None,
    random_weights: RandomWeights = False,
    variant: Variant = None,
    revision: Revision = None,
    lora: LoraFiles = None,
    blocks: Annotated[str | None, typer.Option(help="With random weights: how many, as 3 or 2,2.")] = None,
    verify_timesteps: Timesteps = 3,
    keep_onnx: Annotated[bool, typer.Option("--keep-onnx", help="Keep the exported graphs.")] = False,
    plugins: Plugins = "",
    builder_optimization_level: OptimizationLevel = None,
    refittable: Refittable = False,
    max_segment_gib: SegmentSize = None,
    calibration_prompts: CalibrationPrompts = None,
    calibration_steps: CalibrationSteps = None,
) -> None:
    """Build verified engines from a checkpoint."""
    from stg_trt.models.checkpoint import Checkpoint
    from stg_trt.models.passes import parse_by_pass
    from stg_trt.models.perturbation import parse_blocks

    # Checks that need no torch come first: its import takes seconds.
    perturbed = parse_by_pass("stg_blocks", stg_blocks, parse_blocks)
    kept = parse_blocks(blocks, "blocks", "3")
    choose_sizes(sizes, height, width, num_frames)
    _check(layout, stg_mode, backend, target, precision)
    Checkpoint.open(
        checkpoint, random_weights=random_weights, variant=variant, revision=revision, lora=lora or ()
    )
    from .build import build as build_engines
    from .display import BuildDisplay

    with BuildDisplay() as display:
        folders = build_engines(
            checkpoint, output, height=height, width=width, num_frames=num_frames, sizes=sizes,
            text_length=text_length, condition_frames=condition_frames, frame_rate=frame_rate,
            stg_blocks=perturbed, stg_mode=stg_mode, layout=layout, precision=precision, max_batch=max_batch,
            backend=backend, target=target, random_weights=random_weights, variant=variant, revision=revision,
            lora=lora or (), blocks=kept, verify_timesteps=verify_timesteps, keep_onnx=keep_onnx,
            plugins=[*filter(None, plugins.split(","))], max_segment_gib=max_segment_gib, progress=display,
            builder_optimization_level=builder_optimization_level, calibration_steps=calibration_steps,
            calibration_prompts=calibration_prompts, refittable=refittable,
        )  # fmt: skip
    _print(folders)


def _check(
    layout: str,
    stg_mode: str | None,
    backend: str,
    target: str | None,
    precision: str | None,
) -> None:
    """Raises InvalidRequest for names that do not exist, and for a precision that the backend cannot do."""
    from stg_trt.engines.auto_backend import AUTO
    from stg_trt.engines.backends import backend_for, check_target
    from stg_trt.models.perturbation import check_mode
    from stg_trt.models.segment import check_layout

    check_layout(layout)
    if stg_mode is not None:
        check_mode(stg_mode)
    if backend == AUTO:
        return
    chosen = backend_for(backend)
    targets = (target or chosen.targets[0].name).split(",")
    for name in targets:
        check_target(chosen, name, precision or chosen.target(targets[0]).precisions[0])


def _print(folders: list[Path]) -> None:
    from stg_trt.engines.manifest import load

    from .display import print_summary

    for folder in folders:
        print_summary(folder, load(folder))
