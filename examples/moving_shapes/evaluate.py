"""How often clips show what their prompts say, and how clean they are, under each guidance setting.

python -m examples.moving_shapes.evaluate --engines /tmp/moving_shapes_engines
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from stg_trt import VideoPipeline, build

from .clips import LABELS, NUM_FRAMES, SIZE, Label
from .measure import Measurement, measure
from .report import PARTS, plot, table
from .results import CHECKPOINT, HERE, sha256_of
from .settings import SHOWN, SWEEP, SWEEP_BLOCKS, Setting, passes_per_step, sample

BATCH = 8
TEXT_LENGTH = 16


def measure_clips(
    pipe: VideoPipeline, setting: Setting, work: list[tuple[Label, int]], steps: int
) -> list[Measurement]:
    """Measure one clip for each label and seed; the noise depends on the seed alone, not on the setting."""
    measured = []
    for start in range(0, len(work), BATCH):
        labels, seeds = zip(*work[start : start + BATCH], strict=True)
        clips = sample(pipe, setting, [label.prompt for label in labels], seeds, steps)
        measured += [measure(clip) for clip in clips]
    return measured


def summarise(measured: list[Measurement], work: list[tuple[Label, int]]) -> dict[str, float]:
    """Shares of right clips, and how clean the clips are."""
    matches = [one.matches(label) for one, (label, _) in zip(measured, work, strict=True)]
    shares = {part: float(np.mean([match[part] for match in matches])) for part in PARTS}
    jitters = [one.jitter for one in measured if not np.isnan(one.jitter)]
    overlap = float(np.mean([one.overlap for one in measured]))
    return {**shares, "overlap": overlap, "jitter": float(np.mean(jitters)) if jitters else float("nan")}


def machine() -> dict[str, str]:
    """Where and with what the figures were measured."""
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "onnxruntime")}
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {"date": date.today().isoformat(), "cpu": f"{cpu}, {os.cpu_count()} cores", **packages}


def open_pipeline(checkpoint: Path, engines: Path) -> VideoPipeline:
    """The checkpoint over segmented engines, which serve every mode and block; built if not there yet."""
    if not any(engines.glob("*/manifest.json")):
        build(
            checkpoint,
            output=engines,
            height=SIZE,
            width=SIZE,
            num_frames=NUM_FRAMES,
            text_length=TEXT_LENGTH,
            stg_blocks=list(SWEEP_BLOCKS),
            stg_mode="stg-a",
            layout="segmented",
            precision="fp32",
            max_batch=BATCH,
            backend="onnxruntime",
        )
    return VideoPipeline.from_pretrained(checkpoint, engines=engines)


def evaluate(pipe: VideoPipeline, setting: Setting, seeds: int, steps: int) -> dict[str, Any]:
    """One setting's row of the report."""
    work = [(label, round_ * len(LABELS) + i) for round_ in range(seeds) for i, label in enumerate(LABELS)]
    passes = passes_per_step(setting, pipe.store.builds[0].manifest)
    found = summarise(measure_clips(pipe, setting, work, steps), work)
    return {"name": setting.name, **asdict(setting), "passes_per_step": passes, **found}


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Evaluate the moving-shapes pipeline.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--engines", type=Path, required=True, help="built there if it holds none")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of evaluation.json or sweep.json")
    parser.add_argument("--seeds", type=int, default=2, help="clips for each of the 48 prompts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--sweep", action="store_true", help="CFG 3 with both modes, not the settings of the demo; also plots"
    )
    return parser.parse_args()


def main() -> None:
    """Sample, measure and write the results; the JSON is rewritten after every setting."""
    args = parse_args()
    pipe = open_pipeline(args.checkpoint, args.engines)
    report: dict[str, Any] = {
        "checkpoint_sha256": sha256_of(args.checkpoint),
        "clips": args.seeds * len(LABELS),
        "steps": args.steps,
        "machine": machine(),
        "results": [],
    }
    name = "sweep" if args.sweep else "evaluation"
    for setting in SWEEP if args.sweep else SHOWN:
        report["results"].append(evaluate(pipe, setting, args.seeds, args.steps))
        print(json.dumps(report["results"][-1]), flush=True)
        (args.output / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    if args.sweep:
        plot(report, args.output / "sweep.png")


if __name__ == "__main__":
    main()
