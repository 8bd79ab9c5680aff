"""Builds engines of the small model, animates a picture and makes clips of prompts alone.

All of it under four guidance settings, with the same noise.
"""

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
import numpy as np
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from stg_trt import VideoPipeline, build
from stg_trt.build_engines.display import BuildDisplay
from stg_trt.engines.manifest import Manifest, load
from stg_trt.runtime.video_file import save_video

from .clips import NUM_FRAMES, SIZE, Label, make_picture
from .eager import EagerSteps, eager_steps
from .results import CHECKPOINT, EVALUATION, PICTURES, load_evaluation
from .settings import BLOCK, SHOWN, Setting, passes_per_step, sample
from .sheet import Column, Row, draw_sheet

PICTURE = make_picture(Label("striped", "red", "circle", "left"), np.random.default_rng(0))
ROWS = (
    Row("a striped red circle moving left", PICTURE),
    Row("a striped red circle moving up", PICTURE),
    Row("a striped blue triangle moving right"),
    Row("a plain yellow square moving down"),
)
STEPS = 20
# Of each row's turn.
EAGER_STEPS = 5
# Played slower than it was made, so that its frames can be seen.
PLAYED_FRAME_RATE = 8.0

Measures = dict[str, dict[str, Any]]


@dataclass
class Run:
    """The clips of one setting, one per row, and the milliseconds of its steps."""

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
    save(runs, options.output, load_measures(options.checkpoint))
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
    """The same rows and noise for every setting; all take turns, so that drift hits them alike."""
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("sampling", total=len(ROWS) * len(runs) * STEPS)
        for seed, row in enumerate(ROWS):
            pictures = [] if row.picture is None else [row.picture]
            for run in runs:
                clock = _Clock(run.step_ms, lambda: progress.advance(task))
                (clip,) = sample(pipeline, run.setting, [row.prompt], [seed], STEPS, pictures, clock.tick)
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


def save(runs: Sequence[Run], output: Path, measures: Measures) -> None:
    """One MP4 per row and setting, and a sheet of all of them."""
    for run in runs:
        label = run.setting.name.lower().replace(",", "").replace(" + ", "-").replace(" ", "-")
        for row, clip in zip(ROWS, run.clips, strict=True):
            name = ("" if row.picture is None else "picture-") + row.prompt.replace(" ", "-")
            save_video(clip, output / f"{name}_{label}.mp4", PLAYED_FRAME_RATE)
    columns = [Column(run.setting.name, notes(run, measures), tuple(run.clips)) for run in runs]
    draw_sheet(ROWS, columns, footer(measures)).save(output / "contact_sheet.png")


def load_measures(checkpoint: Path) -> Measures:
    """The committed evaluations by what their clips are made of, if they measured this checkpoint."""
    paths = {"picture": PICTURES, "prompt": EVALUATION}
    found = {made_of: load_evaluation(checkpoint, path) for made_of, path in paths.items()}
    return {made_of: report for made_of, report in found.items() if report is not None}


def notes(run: Run, measures: Measures) -> tuple[str, ...]:
    """The lines below a column: its cost in this run, and the measures of the committed evaluations."""
    lines = [f"{run.passes:.2f} passes, {median(run.step_ms):.0f} ms per step"]
    for made_of, report in measures.items():
        row = next((row for row in report["results"] if row["name"] == run.setting.name), None)
        if row is not None:
            right, overlap = f"{100 * row['all']:.0f} % right", f"overlap {row['overlap']:.3f}"
            lines.append(f"{made_of}: {right}, {overlap}")
    return tuple(lines)


def footer(measures: Measures) -> tuple[str, ...]:
    """What the sheet shows, and where its figures come from."""
    shown = f"First and last frame; same noise in each row; {STEPS} steps; milliseconds: median of this run."
    if not measures:
        return (shown, "No measures: the committed ones are of another checkpoint.")
    clips = ", ".join(f"{report['clips']} per setting ({made_of})" for made_of, report in measures.items())
    return (shown, f"Right: what the prompt says. Overlap: 1 is a perfect shape. Clips measured: {clips}.")


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
