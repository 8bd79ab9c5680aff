"""How often clips show what their prompts say, and how clean they are, under each guidance setting.

python -m examples.moving_shapes.evaluate --engines /tmp/moving_shapes_engines --pictures
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo

from stg_trt import VideoPipeline, build

from .clips import LABELS, NUM_FRAMES, SIZE, Array, Label, make_picture
from .measure import difference, measure
from .report import PARTS, picture_table, plot, table
from .results import CHECKPOINT, HERE, sha256_of
from .settings import SHOWN, SWEEP, SWEEP_BLOCKS, Setting, as_array, as_image, passes_per_step, sample

BATCH = 8
TEXT_LENGTH = 16
CALIBRATION_PROMPTS = HERE / "calibration_prompts.txt"


@dataclass(frozen=True)
class Case:
    """What a clip is asked to show, and the seed of its noise."""

    label: Label
    seed: int


@dataclass(frozen=True)
class Picture:
    """What a clip begins with (height, width, 3) in 0..1, and what the VAE alone makes of it."""

    given: Array
    decoded: Array


def make_cases(count: int) -> list[Case]:
    """Labels in an order that mixes all their parts, so that any number of them has about as many of each."""
    order = np.random.default_rng(0).permutation(len(LABELS))
    return [Case(LABELS[order[seed % len(order)]], seed) for seed in range(count)]


def make_pictures(cases: Sequence[Case], vae: AutoencoderKLLTXVideo) -> list[Picture]:
    """A picture for each case, of all that its label says but the direction, which is left to the prompt."""
    pictures = []
    for case in cases:
        drawn = make_picture(case.label, np.random.default_rng(case.seed))
        given = as_array(as_image(drawn))
        pictures.append(Picture(given, encode_and_decode(given, vae)))
    return pictures


@torch.no_grad()
def encode_and_decode(picture: Array, vae: AutoencoderKLLTXVideo) -> Array:
    """A picture (height, width, 3) in 0..1 as the VAE keeps it."""
    video = torch.from_numpy(picture).permute(2, 0, 1)[None, :, None] * 2 - 1
    (decoded,) = vae.decode(vae.encode(video).latent_dist.mode(), return_dict=False)
    kept: Array = (decoded[0, :, 0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy()
    return kept


def sample_cases(
    pipe: VideoPipeline, setting: Setting, cases: Sequence[Case], steps: int, pictures: Sequence[Picture] = ()
) -> list[Array]:
    """A clip for each case; the noise depends on the seed alone, not on the setting."""
    clips: list[Array] = []
    for start in range(0, len(cases), BATCH):
        batch = slice(start, start + BATCH)
        prompts, seeds = zip(*((case.label.prompt, case.seed) for case in cases[batch]), strict=True)
        clips += [*sample(pipe, setting, prompts, seeds, steps, [one.given for one in pictures[batch]])]
    return clips


def summarise(clips: Sequence[Array], cases: Sequence[Case]) -> dict[str, float]:
    """Shares of right clips, and how clean the clips are."""
    measured = [measure(clip) for clip in clips]
    matches = [one.matches(case.label) for one, case in zip(measured, cases, strict=True)]
    shares = {part: float(np.mean([match[part] for match in matches])) for part in PARTS}
    jitters = [one.jitter for one in measured if not np.isnan(one.jitter)]
    overlap = float(np.mean([one.overlap for one in measured]))
    return {**shares, "overlap": overlap, "jitter": float(np.mean(jitters)) if jitters else float("nan")}


def first_frame_errors(clips: Sequence[Array], pictures: Sequence[Picture]) -> list[float]:
    """How far each clip's first frame is from its picture as the VAE keeps it, in levels of 255."""
    return [difference(clip[0], picture.decoded) for clip, picture in zip(clips, pictures, strict=True)]


def machine() -> dict[str, str]:
    """Where and with what the figures were measured."""
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "onnxruntime")}
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {"date": date.today().isoformat(), "cpu": f"{cpu}, {torch.get_num_threads()} threads", **packages}


def open_pipeline(checkpoint: Path, engines: Path, precision: str = "fp32") -> VideoPipeline:
    """The checkpoint over segmented engines, which serve every mode and block; built if not there yet.

    FP8 is calibrated on prompts of the model's own kind.
    """
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
            precision=precision,
            max_batch=BATCH,
            backend="onnxruntime",
            calibration_prompts=CALIBRATION_PROMPTS if precision == "fp8" else None,
        )
    return VideoPipeline.from_pretrained(checkpoint, engines=engines)


def evaluate(
    pipe: VideoPipeline, setting: Setting, cases: Sequence[Case], steps: int, pictures: Sequence[Picture] = ()
) -> dict[str, Any]:
    """One setting's row of the report: clips of prompts alone, or of pictures and prompts."""
    passes = passes_per_step(setting, pipe.store.builds[0].manifest)
    clips = sample_cases(pipe, setting, cases, steps, pictures)
    row = {"name": setting.name, **asdict(setting), "passes_per_step": passes, **summarise(clips, cases)}
    if pictures:
        row["first_frame_error"] = max(first_frame_errors(clips, pictures))
    return row


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Evaluate the moving-shapes pipeline.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--engines", type=Path, required=True, help="built there if it holds none")
    parser.add_argument("--precision", choices=("fp32", "fp8"), default="fp32", help="of engines built there")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the JSON files")
    parser.add_argument("--clips", type=int, default=96, help="for each setting; there are 96 prompts")
    parser.add_argument("--steps", type=int, default=20)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--sweep", action="store_true", help="CFG 3 with both modes, not the settings of the demo; also plots"
    )
    kinds.add_argument("--pictures", action="store_true", help="clips that begin with pictures")
    return parser.parse_args()


def main() -> None:
    """Sample, measure and write the results; the JSON is rewritten after every setting."""
    args = parse_args()
    pipe = open_pipeline(args.checkpoint, args.engines, args.precision)
    cases = make_cases(args.clips)
    report: dict[str, Any] = {
        "checkpoint_sha256": sha256_of(args.checkpoint, vae_encoder=args.pictures),
        "clips": len(cases),
        "steps": args.steps,
        "precision": pipe.store.builds[0].manifest.workload.precision,
        "machine": machine(),
        "results": [],
    }
    pictures: list[Picture] = []
    if args.pictures:
        pictures = make_pictures(cases, AutoencoderKLLTXVideo.from_pretrained(args.checkpoint / "vae"))
        report["vae_error"] = float(np.mean([difference(one.decoded, one.given) for one in pictures]))
    name = "sweep" if args.sweep else "pictures" if args.pictures else "evaluation"
    for setting in SWEEP if args.sweep else SHOWN:
        report["results"].append(evaluate(pipe, setting, cases, args.steps, pictures))
        print(json.dumps(report["results"][-1]), flush=True)
        (args.output / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    print(picture_table(report) if args.pictures else table(report))
    if args.sweep:
        plot(report, args.output / "sweep.png")


if __name__ == "__main__":
    main()
