"""Engines in both layouts, the same prompts with CFG and with CFG+STG, and what each step costs."""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stg_trt import VideoPipeline, build
from stg_trt.build_engines.display import BuildDisplay
from stg_trt.cli.inspect import describe
from stg_trt.engines.store import EngineStore
from stg_trt.runtime.video_file import save_video

CHECKPOINT = Path(__file__).parent / "checkpoint"
PROMPTS = (
    "a red circle moving left",
    "a green square moving up",
    "a blue triangle moving right",
    "a yellow circle moving down",
)
SIZE = 48
NUM_FRAMES = 9
STG_BLOCK = 5
STEPS = 20
FRAME_RATE = 25.0
# Played slower than it was made, so that nine frames can be seen.
PLAYED_FRAME_RATE = 8.0


@dataclass
class Setting:
    """One column of the contact sheet."""

    name: str
    layout: str
    stg_scale: float
    frames: Any = None
    step_ms: list[float] = field(default_factory=list)


def main() -> None:
    """Builds, generates, and writes videos, a contact sheet and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"))
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    options = parser.parse_args()
    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    options.output.mkdir(parents=True, exist_ok=True)
    engines = options.output / "engines"
    build_layouts(options.checkpoint, engines)
    settings = (
        Setting("CFG", "segmented", 0.0),
        Setting("CFG + STG twin", "twin", 1.0),
        Setting("CFG + STG segmented", "segmented", 1.0),
    )
    generate(settings, options.checkpoint, engines)
    save(settings, options.output)
    print_costs(settings, EngineStore.open(engines))
    Console().print(f"Videos and contact_sheet.png are in {options.output}")


def build_layouts(checkpoint: Path, engines: Path) -> None:
    """The twin and the segmented engines of the same model."""
    for layout in ("segmented", "twin"):
        with BuildDisplay() as display:
            build(
                checkpoint,
                engines,
                height=SIZE,
                width=SIZE,
                num_frames=NUM_FRAMES,
                text_length=16,
                stg_blocks=[STG_BLOCK],
                stg_mode="stg-a",
                layout=layout,
                progress=display,
            )


def generate(settings: tuple[Setting, ...], checkpoint: Path, engines: Path) -> None:
    """The same prompts and noise for every setting; the settings take turns, so that drift hits all alike."""
    pipelines = {
        layout: VideoPipeline.from_pretrained(checkpoint, engines=engines, layout=layout)
        for layout in ("segmented", "twin")
    }
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("sampling", total=len(PROMPTS) * len(settings) * STEPS)
        for setting in settings:
            setting.frames = []
        for index, prompt in enumerate(PROMPTS):
            for setting in settings:
                clock = _Clock(setting, lambda: progress.advance(task))
                result = pipelines[setting.layout](
                    prompt=prompt,
                    height=SIZE,
                    width=SIZE,
                    num_frames=NUM_FRAMES,
                    frame_rate=FRAME_RATE,
                    num_inference_steps=STEPS,
                    guidance_scale=3.0,
                    stg_scale=setting.stg_scale,
                    rescale=0.0,
                    generator=torch.Generator().manual_seed(index),
                    output_type="np",
                    callback_on_step_end=clock.tick,
                )
                setting.frames.append(result.frames[0])


class _Clock:
    """Milliseconds between the ends of steps; the first step, which also loads, is left out."""

    def __init__(self, setting: Setting, on_step: Any) -> None:
        self._setting = setting
        self._on_step = on_step
        self._last: float | None = None

    def tick(self, pipeline: Any, step: int, timestep: float, tensors: Any) -> None:
        """The pipeline's callback_on_step_end."""
        now = time.perf_counter()
        if self._last is not None:
            self._setting.step_ms.append((now - self._last) * 1e3)
        self._last = now
        self._on_step()


def save(settings: tuple[Setting, ...], output: Path) -> None:
    """One MP4 per prompt and setting, and a sheet of all of them."""
    for setting in settings:
        label = setting.name.lower().replace(" + ", "-").replace(" ", "-")
        for prompt, frames in zip(PROMPTS, setting.frames, strict=True):
            save_video(frames, output / f"{prompt.replace(' ', '-')}_{label}.mp4", PLAYED_FRAME_RATE)
    contact_sheet(settings).save(output / "contact_sheet.png")


def contact_sheet(settings: tuple[Setting, ...]) -> Image.Image:
    """Rows are prompts, columns are settings; each cell shows the first, middle and last frame."""
    scale, gap, text = 2, 12, 18
    side = SIZE * scale
    cell_width, cell_height = 3 * side + 8, side
    sheet = Image.new(
        "RGB",
        (len(settings) * (cell_width + gap) + gap, len(PROMPTS) * (cell_height + text + gap) + text + gap),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, setting in enumerate(settings):
        left = gap + column * (cell_width + gap)
        draw.text((left, 4), setting.name, fill="black")
        for row, frames in enumerate(setting.frames):
            top = text + row * (cell_height + text + gap)
            draw.text((left, top), PROMPTS[row], fill="gray")
            for i, frame in enumerate((frames[0], frames[len(frames) // 2], frames[-1])):
                image = Image.fromarray((frame * 255).round().clip(0, 255).astype(np.uint8))
                image = image.resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(image, (left + i * (side + 4), top + text))
    return sheet


def print_costs(settings: tuple[Setting, ...], store: EngineStore) -> None:
    """Passes computed per step, time per step, and the ratio to CFG."""
    described = {d["layout"]: d["guidance_states"] for d in map(describe, store.builds)}
    one_pass = described["segmented"]["cond"]["flops"]
    cfg_ms = float(np.median(settings[0].step_ms))
    table = Table(title=f"{platform.machine()}, {os.cpu_count()} cores, ONNX Runtime", title_justify="left")
    for column in ("setting", "passes per step", "ms per step (median)", "ratio to CFG"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for setting in settings:
        state = described[setting.layout]["cfg+stg" if setting.stg_scale else "cfg"]
        step_ms = float(np.median(setting.step_ms))
        passes = state["flops"] / one_pass
        table.add_row(setting.name, f"{passes:.2f}", f"{step_ms:.1f}", f"{step_ms / cfg_ms:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
