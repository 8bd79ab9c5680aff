"""The command line of generation."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command_arguments import EMBEDS, read_options

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from stg_trt.engines.store import EngineRequest, EngineStore
    from stg_trt.models.checkpoint import Checkpoint

    from .output import VideoPipelineOutput
    from .pipeline import StepCallback, VideoPipeline
    from .stages import Stage


Embeds = Annotated[
    Path | None, typer.Option(help=f"Instead of a prompt: safetensors with {', '.join(EMBEDS)}.")
]
SkipScale = Annotated[
    list[str] | None,
    typer.Option(help="STG: a number, or one per step: 0,1,1; or NAME=1 for each pass."),
]
FrameRate = Annotated[float | None, typer.Option("--frame-rate", "--fps", help="Frames per second.")]
SkipBlocks = Annotated[
    list[str] | None, typer.Option(help="As 14,19; or NAME=15 for each pass. [default: the engines']")
]
SoundScales = Annotated[
    list[str] | None, typer.Option(help="modality_scale=3, audio_guidance_scale=7 and the like; repeat it.")
]
Conditions = Annotated[
    list[str] | None,
    typer.Option(help="FILE@FRAME:STRENGTH, a picture or video from a frame on, as end.png@120:0.9."),
]

# Of the server's command line too.
Loras = Annotated[list[str] | None, typer.Option(help="FILE:SCALE, as at the build; repeat it.")]
LayoutName = Annotated[str | None, typer.Option(help="segmented or twin. [default: what fits]")]
BackendName = Annotated[str | None, typer.Option(help="[default: what fits]")]
Offload = Annotated[bool, typer.Option("--offload", help="Text encoder and VAE leave the GPU.")]
VaeTiling = Annotated[bool, typer.Option("--vae-tiling", help="Decode in tiles: less memory.")]
GuidanceParallel = Annotated[int, typer.Option(help="GPUs that share the passes of each step.")]


def generate(
    checkpoint: Annotated[str, typer.Argument(help="The checkpoint that the engines were built from.")],
    engines: Annotated[Path, typer.Option(help="A folder made by stg-trt build.")],
    output: Annotated[Path, typer.Option(help="video.mp4, or latents.safetensors.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Repeat it for several videos.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="CFG moves away from it.")] = None,
    image: Annotated[Path | None, typer.Option(help="The picture that the video begins with.")] = None,
    last_image: Annotated[Path | None, typer.Option(help="The picture that it ends with.")] = None,
    condition: Conditions = None,
    embeds: Embeds = None,
    height: Annotated[int | None, typer.Option(help="Pixels. [default: the engines']")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels. [default: the engines']")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames. [default: the engines']")] = None,
    frame_rate: FrameRate = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    timesteps: Annotated[str | None, typer.Option(help="Of all steps, such as 1000,909,725.")] = None,
    sigmas: Annotated[str | None, typer.Option(help="Of all steps, such as 1,0.9,0.7.")] = None,
    guidance_scale: Annotated[str | None, typer.Option(help="CFG: a number, or one per step: 3,3,1.")] = None,
    guidance_scale_2: Annotated[str | None, typer.Option(help="CFG of the second expert's steps.")] = None,
    true_cfg_scale: Annotated[str | None, typer.Option(help="CFG of distilled models.")] = None,
    min_guidance_scale: Annotated[float | None, typer.Option(help="Of a CFG that rises.")] = None,
    max_guidance_scale: Annotated[float | None, typer.Option(help="Of a CFG that rises.")] = None,
    stg_scale: SkipScale = None,
    stg_mode: Annotated[str | None, typer.Option(help="stg-a or stg-r. [default: the engines']")] = None,
    stg_blocks: SkipBlocks = None,
    sound: SoundScales = None,
    rescale: Annotated[str | None, typer.Option(help="0 (off) to 1; a number, or one per step.")] = None,
    preset: Annotated[str | None, typer.Option(help="Published per-step tables by name.")] = None,
    use_dynamic_cfg: Annotated[bool, typer.Option("--use-dynamic-cfg", help="CogVideoX's.")] = False,
    motion_bucket_id: Annotated[float | None, typer.Option(help="More of it moves more.")] = None,
    noise_aug_strength: Annotated[float | None, typer.Option(help="Noise on the picture.")] = None,
    decode_chunk_size: Annotated[int | None, typer.Option(help="Frames decoded at once.")] = None,
    num_videos_per_prompt: Annotated[int, typer.Option(help="Videos per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the noise.", min=0, max=2**63 - 1)] = 0,
    variant: Annotated[str | None, typer.Option(help="Of the checkpoint's weight files, as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the checkpoint on the hub.")] = None,
    lora: Loras = None,
    layout: LayoutName = None,
    backend: BackendName = None,
    offload: Offload = False,
    vae_tiling: VaeTiling = False,
    guidance_parallel: GuidanceParallel = 1,
) -> None:
    """Generate videos with compiled engines."""
    began = time.perf_counter()
    opened = _open_checkpoint(checkpoint, variant, revision, lora or [], bool(prompt), output)
    request = _request(height, width, num_frames, layout, backend)
    options = read_options(
        embeds, guidance_scale=guidance_scale, min_guidance_scale=min_guidance_scale, stg_blocks=stg_blocks,
        guidance_scale_2=guidance_scale_2, true_cfg_scale=true_cfg_scale, use_dynamic_cfg=use_dynamic_cfg,
        max_guidance_scale=max_guidance_scale, rescale=rescale, motion_bucket_id=motion_bucket_id,
        noise_aug_strength=noise_aug_strength, decode_chunk_size=decode_chunk_size, stg_mode=stg_mode,
        timesteps=timesteps, sigmas=sigmas, stg_scale=stg_scale, preset=preset, condition=condition,
        num_frames=num_frames, image=image, last_image=last_image, sound=sound, frame_rate=frame_rate,
        height=height, width=width, negative_prompt=negative_prompt, prompt=prompt or None,
        num_inference_steps=num_inference_steps, num_videos_per_prompt=num_videos_per_prompt,
    )  # fmt: skip
    pipeline = _open_pipeline(opened, engines, request, offload, vae_tiling, guidance_parallel)
    options |= {"generator": _generator(seed), "output_type": _output_type(output)}
    _make(pipeline, options, output, frame_rate, time.perf_counter() - began)


def _make(
    pipeline: VideoPipeline,
    options: dict[str, Any],
    output: Path,
    frame_rate: float | None,
    opened_s: float,
) -> None:
    """Calls the pipeline and writes the files; says their names, and where the seconds went."""
    from .video_writer import VideoWriter

    frame_rate = frame_rate or pipeline.family.defaults.frame_rate
    with _progress_bar() as advance, VideoWriter(output, frame_rate) as writer:
        if options["output_type"] != "latent":
            options["callback_on_video_end"] = writer.take
        made = pipeline(callback_on_step_end=advance, **options)
        made_at = time.perf_counter()
        paths = writer.finish() or [_save_latents(made, output)]
    print(*paths, sep="\n")
    _say_stages(made.stages, opened_s, time.perf_counter() - made_at)


def _say_stages(stages: Mapping[Stage, float], opened: float, written: float) -> None:
    from .stages import STAGES

    seconds = {**stages, "load": opened + stages.get("load", 0.0), "encode": written}
    said = ", ".join(f"{stage} {seconds[stage]:.2f} s" for stage in STAGES if stage in seconds)
    print(f"{said}: {sum(seconds.values()):.2f} s in all", file=sys.stderr)


def _check_output(output: Path) -> None:
    """Raises InvalidRequest before minutes are spent on the video."""
    from stg_trt.errors import InvalidRequest

    if output.suffix not in (".mp4", ".safetensors"):
        raise InvalidRequest(
            f"output: expected a name ending in .mp4 or .safetensors, got {output}: rename it"
        )
    if not output.parent.is_dir():
        raise InvalidRequest(f"output: expected an existing folder, got {output.parent}: create it first")
    if not os.access(output.parent, os.W_OK):
        raise InvalidRequest(
            f"output: expected a folder that can be written, got {output.parent}: choose another"
        )
    if output.is_dir():
        raise InvalidRequest(f"output: expected a file's name, got the folder {output}: choose another")


def _output_type(output: Path) -> str:
    """Frames for a video, else latents."""
    return "np" if output.suffix == ".mp4" else "latent"


def _open_checkpoint(
    checkpoint: str, variant: str | None, revision: str | None, lora: list[str], encodes: bool, output: Path
) -> Checkpoint:
    """Raises InvalidRequest unless the call's parts are there, their files whole, and the output possible."""
    from stg_trt.models.checkpoint import Checkpoint
    from stg_trt.models.published import published

    _check_output(output)  # Checks without models come first: importing diffusers takes seconds.
    opened = Checkpoint.open(
        checkpoint,
        random_weights=checkpoint in published(),
        variant=variant,
        revision=revision,
        lora=lora,
    )
    if encodes and opened.family.reads_text:
        opened.check_text()
    opened.check_connector()
    if output.suffix == ".mp4":
        opened.check_vae()
        opened.check_sound()
    return opened


def _open_engines(engines: Path, request: EngineRequest, checkpoint: Checkpoint) -> EngineStore:
    """Opens the folder; raises if the model cannot have the size, or no build fits the request here."""
    from dataclasses import replace

    from stg_trt.engines.store import EngineStore, find_possible
    from stg_trt.system.gpu import this_machine

    store = EngineStore.open(engines)
    find_possible(store, replace(request, machine=this_machine()), checkpoint.family)
    return store


def _request(
    height: int | None, width: int | None, num_frames: int | None, layout: str | None, backend: str | None
) -> EngineRequest:
    from stg_trt.engines.store import EngineRequest

    return EngineRequest(height=height, width=width, num_frames=num_frames, layout=layout, backend=backend)


def _open_pipeline(
    checkpoint: Checkpoint,
    engines: Path,
    request: EngineRequest,
    offload: bool,
    vae_tiling: bool,
    guidance_parallel: int,
) -> VideoPipeline:
    store = _open_engines(engines, request, checkpoint)
    from .pipeline import VideoPipeline

    quiet_libraries()
    return VideoPipeline(
        checkpoint,
        store,
        layout=request.layout,
        backend=request.backend,
        offload=offload,
        vae_tiling=vae_tiling,
        guidance_parallel=guidance_parallel,
    )


def _generator(seed: int) -> Generator:
    import torch

    return torch.Generator().manual_seed(seed)


def quiet_libraries() -> None:
    """Hides the libraries' notes on loading, which do not concern the user of this command."""
    import diffusers
    import transformers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def _progress_bar() -> Iterator[StepCallback]:
    """A bar on a terminal, and the callback that moves it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading", total=None)

        def advance(pipe: VideoPipeline, step: int, timestep: float, tensors: dict[str, Tensor]) -> None:
            progress.update(task, description="sampling", completed=step + 1, total=pipe.num_timesteps)

        yield advance


def _save_latents(made: VideoPipelineOutput, output: Path) -> Path:
    from safetensors.torch import save

    from stg_trt.system.files import write_atomically

    sound = {} if made.audio is None else {"audio_latents": made.audio}
    write_atomically(output, save({"latents": made.frames, **sound}))
    return output
