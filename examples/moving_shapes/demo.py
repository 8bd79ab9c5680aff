"""Builds engines of the small model and samples the same prompts and noise under four guidance settings."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stg_trt import VideoPipeline, build
from stg_trt.build_engines.display import BuildDisplay
from stg_trt.engines.manifest import Manifest, load
from stg_trt.runtime.video_file import save_video

from .clips import NUM_FRAMES, SIZE
from .eager import EagerSteps, eager_steps
from .results import CHECKPOINT, load_evaluation
from .settings import BLOCK, SHOWN, Setting, passes_per_step, sample
from .sheet import Column, draw_sheet

PROMPTS = (
    "a red circle moving left",
    "a green square moving up",
    "a blue triangle moving right",
    "a yellow circle moving down",
)
STEPS = 20
# Of each prompt's turn.
EAGER_STEPS = 5
# Played slower than it was made, so that nine frames can be seen.
PLAYED_FRAME_RATE = 8.0


@dataclass
class Run:
    """The clips of one setting, one per prompt, and the milliseconds of its steps."""

    setting: Setting
    passes: float
    clips: list[Any] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)


def main() -> None:
    """Builds, generates, and writes videos, a contact sheet and a table of costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"))
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    options = parser.parse_args()
    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    options.output.mkdir(parents=True, exist_ok=True)
    engines = options.output / "engines"
    manifest = build_engines(options.checkpoint, engines)
    pipeline = VideoPipeline.from_pretrained(options.checkpoint, engines=engines, layout="segmented")
    runs = [Run(setting, passes_per_step(setting, manifest)) for setting in SHOWN]
    eager = eager_steps(options.checkpoint)
    generate(pipeline, runs, eager)
    save(runs, options.output, load_evaluation(options.checkpoint))
    print_costs(runs, eager)
    Console().print(f"Videos and contact_sheet.png are in {options.output}")


def build_engines(checkpoint: Path, engines: Path) -> Manifest:
    """Segmented engines, in which the shown settings can perturb their block."""
    with BuildDisplay() as display:
        (folder,) = build(
            checkpoint,
            engines,
            height=SIZE,
            width=SIZE,
            num_frames=NUM_FRAMES,
            text_length=16,
            stg_blocks=[BLOCK],
            stg_mode="stg-a",
            layout="segmented",
            progress=display,
        )
    return load(folder)


def generate(pipeline: VideoPipeline, runs: Sequence[Run], eager: Sequence[EagerSteps] = ()) -> None:
    """The same prompts and noise for every setting; all take turns, so that drift hits them alike."""
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("sampling", total=len(PROMPTS) * len(runs) * STEPS)
        for seed, prompt in enumerate(PROMPTS):
            for run in runs:
                clock = _Clock(run.step_ms, lambda: progress.advance(task))
                (clip,) = sample(pipeline, run.setting, [prompt], [seed], STEPS, clock.tick)
                run.clips.append(clip)
            for steps in eager:
                steps.run(EAGER_STEPS)


class _Clock:
    """Appends the milliseconds between the ends of steps, without the first step, which also loads."""

    def __init__(self, step_ms: list[float], on_step: Callable[[], None]) -> None:
        self._step_ms = step_ms
        self._on_step = on_step
        self._last: float | None = None

    def tick(self, pipeline: Any, step: int, timestep: float, tensors: Any) -> None:
        """The pipeline's callback_on_step_end."""
        now = time.perf_counter()
        if self._last is not None:
            self._step_ms.append((now - self._last) * 1e3)
        self._last = now
        self._on_step()


def save(runs: Sequence[Run], output: Path, evaluation: dict[str, Any] | None) -> None:
    """One MP4 per prompt and setting, and a sheet of all of them."""
    for run in runs:
        label = run.setting.name.lower().replace(",", "").replace(" + ", "-").replace(" ", "-")
        for prompt, clip in zip(PROMPTS, run.clips, strict=True):
            save_video(clip, output / f"{prompt.replace(' ', '-')}_{label}.mp4", PLAYED_FRAME_RATE)
    columns = [Column(run.setting.name, notes(run, evaluation), tuple(run.clips)) for run in runs]
    draw_sheet(PROMPTS, columns, footer(evaluation)).save(output / "contact_sheet.png")


def notes(run: Run, evaluation: dict[str, Any] | None) -> tuple[str, ...]:
    """The lines below a column: its cost in this run, and the measures of the committed evaluation."""
    cost = f"{run.passes:.2f} passes, {median(run.step_ms):.0f} ms per step"
    rows = {row["name"]: row for row in evaluation["results"]} if evaluation else {}
    if run.setting.name not in rows:
        return (cost,)
    row = rows[run.setting.name]
    return (
        cost,
        f"overlap {row['overlap']:.3f}, jitter {row['jitter']:.2f} px",
        f"{100 * row['all']:.0f} % show what the prompt says",
    )


def footer(evaluation: dict[str, Any] | None) -> tuple[str, ...]:
    """What the sheet shows, and where its figures come from."""
    shown = f"First and last frame; same noise in each row; {STEPS} steps; milliseconds: median of this run."
    if evaluation is None:
        return (shown, "No measures: evaluation.json is of another checkpoint.")
    clips = f"{evaluation['clips']} clips per setting (evaluation.json)"
    return (shown, f"Overlap: 1 is a perfect shape. Jitter: 0 is a straight path. Measured on {clips}.")


def print_costs(runs: Sequence[Run], eager: Sequence[EagerSteps]) -> None:
    """Passes computed per step, passes without the shared prefix, and time per step; then diffusers'."""
    where = f"{platform.machine()}, {os.cpu_count()} cores, ONNX Runtime"
    table = Table(title=f"{where}: one step", title_justify="left")
    for column in ("setting", "passes", "in full", "ms (median)"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for run in runs:
        full = len(run.setting.passes)
        table.add_row(run.setting.name, f"{run.passes:.2f}", f"{full}", f"{median(run.step_ms):.1f}")
    for steps in eager:
        passes, name = len(steps.passes), "diffusers, eager: " + "+".join(map(str, steps.passes))
        table.add_row(name, f"{passes:.2f}", f"{passes}", f"{median(steps.step_ms):.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
