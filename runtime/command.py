"""The command line of generation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .command_arguments import EMBEDS, EmbedsFile, read_conditions, read_embeds, read_guidance, read_numbers

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from stg_trt.engines.store import EngineRequest, EngineStore
    from stg_trt.models.checkpoint import Checkpoint

    from .pipeline import StepCallback, VideoPipeline


Embeds = Annotated[
    Path | None, typer.Option(help=f"Instead of a prompt: safetensors with {', '.join(EMBEDS)}.")
]
SkipScale = Annotated[
    list[str] | None,
    typer.Option(help="STG: a number, or one per step: 0,1,1; or NAME=1 for each pass."),
]
SkipBlocks = Annotated[
    list[str] | None, typer.Option(help="As 14,19; or NAME=15 for each pass. [default: the engines']")
]
Conditions = Annotated[
    list[str] | None,
    typer.Option(help="FILE@FRAME:STRENGTH, a picture or video from a frame on, as end.png@120:0.9."),
]


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
    frame_rate: Annotated[float | None, typer.Option(help="Frames per second.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    timesteps: Annotated[str | None, typer.Option(help="Of all steps, such as 1000,909,725.")] = None,
    sigmas: Annotated[str | None, typer.Option(help="Of all steps, such as 1,0.9,0.7.")] = None,
    guidance_scale: Annotated[str | None, typer.Option(help="CFG: a number, or one per step: 3,3,1.")] = None,
    guidance_scale_2: Annotated[str | None, typer.Option(help="CFG of the second expert's steps.")] = None,
    true_cfg_scale: Annotated[str | None, typer.Option(help="CFG of distilled models.")] = None,
    stg_scale: SkipScale = None,
    stg_mode: Annotated[str | None, typer.Option(help="stg-a or stg-r. [default: the engines']")] = None,
    stg_blocks: SkipBlocks = None,
    rescale: Annotated[str | None, typer.Option(help="0 (off) to 1; a number, or one per step.")] = None,
    preset: Annotated[str | None, typer.Option(help="Published per-step tables by name.")] = None,
    use_dynamic_cfg: Annotated[bool, typer.Option("--use-dynamic-cfg", help="CogVideoX's.")] = False,
    num_videos_per_prompt: Annotated[int, typer.Option(help="Videos per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the noise.", min=0, max=2**63 - 1)] = 0,
    variant: Annotated[str | None, typer.Option(help="Of the checkpoint's weight files, as fp16.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the checkpoint on the hub.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="FILE:SCALE, as at the build; repeat it.")] = None,
    layout: Annotated[str | None, typer.Option(help="segmented or twin. [default: what fits]")] = None,
    backend: Annotated[str | None, typer.Option(help="[default: what fits]")] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Text encoder and VAE leave the GPU.")] = False,
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="Decode in tiles: less memory.")] = False,
) -> None:
    """Generate videos with compiled engines."""
    _check_output(output)  # Checks without models come first: importing diffusers takes seconds.
    opened = _open_checkpoint(checkpoint, variant, revision, lora or [])
    _check_parts(opened, encodes=bool(prompt), decodes=output.suffix == ".mp4")
    options = read_guidance(
        guidance_scale=guidance_scale, guidance_scale_2=guidance_scale_2, true_cfg_scale=true_cfg_scale,
        stg_scale=stg_scale, stg_mode=stg_mode, stg_blocks=stg_blocks, rescale=rescale, preset=preset,
        use_dynamic_cfg=use_dynamic_cfg,
    )  # fmt: skip
    request = _request(height, width, num_frames, layout, backend)
    store = _open_engines(engines, request, opened)
    given: EmbedsFile = {} if embeds is None else read_embeds(embeds)
    pipeline = _open_pipeline(opened, store, request, offload=offload, vae_tiling=vae_tiling)
    with _progress_bar() as advance:
        frames = pipeline(
            prompt=prompt or None, negative_prompt=negative_prompt, image=image, last_image=last_image,
            conditions=read_conditions(condition), height=height, width=width, num_frames=num_frames,
            frame_rate=frame_rate, guidance=options, generator=_generator(seed),
            num_inference_steps=num_inference_steps, timesteps=read_numbers("timesteps", timesteps),
            sigmas=read_numbers("sigmas", sigmas), num_videos_per_prompt=num_videos_per_prompt,
            callback_on_step_end=advance,
            output_type="np" if output.suffix == ".mp4" else "latent", **given,
        ).frames  # fmt: skip
    print(*_save(frames, output, frame_rate or pipeline.family.defaults.frame_rate), sep="\n")


def _request(
    height: int | None, width: int | None, num_frames: int | None, layout: str | None, backend: str | None
) -> EngineRequest:
    """Checks the names of layout and backend."""
    from stg_trt.engines.store import EngineRequest

    return EngineRequest(height=height, width=width, num_frames=num_frames, layout=layout, backend=backend)


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


def _open_checkpoint(
    checkpoint: str, variant: str | None, revision: str | None, lora: list[str]
) -> Checkpoint:
    from stg_trt.models.checkpoint import Checkpoint, published

    return Checkpoint.open(
        checkpoint,
        random_weights=checkpoint in published(),
        variant=variant,
        revision=revision,
        lora=lora,
    )


def _check_parts(checkpoint: Checkpoint, *, encodes: bool, decodes: bool) -> None:
    """Raises InvalidRequest unless the parts that the call needs are there and their files whole."""
    if encodes:
        checkpoint.check_text()
    if decodes:
        checkpoint.check_vae()


def _open_engines(engines: Path, request: EngineRequest, checkpoint: Checkpoint) -> EngineStore:
    """Opens the folder; raises if the model cannot have the size, or no build fits the request here."""
    from dataclasses import replace

    from stg_trt.engines.store import EngineStore, find_possible
    from stg_trt.system.gpu import this_machine

    store = EngineStore.open(engines)
    find_possible(store, replace(request, machine=this_machine()), checkpoint.family)
    return store


def _open_pipeline(
    checkpoint: Checkpoint, store: EngineStore, request: EngineRequest, *, offload: bool, vae_tiling: bool
) -> VideoPipeline:
    from .pipeline import VideoPipeline

    _quiet_libraries()
    return VideoPipeline(
        checkpoint,
        store,
        layout=request.layout,
        backend=request.backend,
        offload=offload,
        vae_tiling=vae_tiling,
    )


def _generator(seed: int) -> Generator:
    import torch

    return torch.Generator().manual_seed(seed)


def _quiet_libraries() -> None:
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


def _save(frames: Any, output: Path, frame_rate: float) -> list[Path]:
    """One file per video: video.mp4, or video-0.mp4, video-1.mp4 and so on."""
    from safetensors.torch import save

    from stg_trt.system.files import write_atomically

    from .video_file import save_video

    if output.suffix == ".safetensors":
        write_atomically(output, save({"latents": frames}))
        return [output]
    paths = [output]
    if len(frames) > 1:
        paths = [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(len(frames))]
    for path, video in zip(paths, frames, strict=True):
        save_video(video, path, frame_rate)
    return paths
