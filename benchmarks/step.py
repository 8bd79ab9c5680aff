"""One sampling step: CFG+STG with the shared prefix, CFG+STG in full, and CFG alone."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stg_trt.build_engines.build import build
from stg_trt.checkpoint import Checkpoint
from stg_trt.device import Cpu
from stg_trt.engine_store import Build
from stg_trt.errors import GateMissed
from stg_trt.families.base import KEEP_ATTENTION
from stg_trt.manifest import load
from stg_trt.segment import Segment
from stg_trt.step_plan import GROUPS, StepPlan, full_plan, plan_step
from stg_trt.step_runner import StepBuffers, StepRunner, two_sided

from . import record

_MODEL = Path(__file__).parent / "models" / "ltx-video-512x12"
_WARMUPS = 3
_MAX_ABS = 1e-4


@dataclass(frozen=True)
class StepBenchmark:
    """Times plans over the same engines in alternating rounds, after comparing their predictions."""

    checkpoint: str | None
    height: int
    width: int
    num_frames: int
    text_length: int
    stg_blocks: tuple[int, ...]
    rounds: int

    def run(self, output: Path, engines: Path | None) -> None:
        """Builds, verifies, times, prints a table and writes the JSON."""
        source = self.checkpoint or str(_MODEL)
        with ExitStack() as stack:
            root = engines or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            (folder,) = build(
                source,
                root,
                height=self.height,
                width=self.width,
                num_frames=self.num_frames,
                text_length=self.text_length,
                stg_blocks=self.stg_blocks,
                stg_mode="stg-a",
                random_weights=True,
                verify_timesteps=1,
            )
            result = self._measure(Build(folder, load(folder)), source)
        record.save(result, output)
        _print(result)

    def _measure(self, built: Build, source: str) -> dict[str, Any]:
        family = Checkpoint.open(source, random_weights=True).family
        manifest = built.manifest
        segments = [r.segment for r in manifest.segments if not r.segment.text]
        specs = list(family.tensors(manifest.workload).values())
        buffers = StepBuffers(specs, two_sided(segments, family.borders), 1, torch.device("cpu"))
        _fill(buffers, specs)
        engines = built.load_engines(Cpu())
        plans = {
            "shared": plan_step(segments, GROUPS, manifest.perturbation),
            "full": full_plan(segments, GROUPS, manifest.perturbation),
            "cfg": plan_step(segments, GROUPS[:2], None),
        }
        runners = {name: StepRunner(plan, engines, buffers, family.borders) for name, plan in plans.items()}
        difference = _verify(runners, buffers)
        seconds = _time(runners, self.rounds)

        def flops(plan: StepPlan) -> int:
            return plan.flops(lambda segment: _flops(family, segment, manifest.workload))

        paired = sorted(a / b for a, b in zip(seconds["shared"], seconds["full"], strict=True))
        ratio = paired[len(paired) // 2]
        expected = flops(plans["shared"]) / flops(plans["full"])
        return {
            "benchmark": "step",
            "model": Path(source).name,
            "backend": manifest.backend,
            "workload": asdict(manifest.workload),
            "stg_mode": manifest.stg_mode,
            "stg_blocks": list(manifest.stg_blocks),
            "max_abs_shared_against_full": difference,
            "rounds": self.rounds,
            "timings": {
                name: {**record.percentiles(times), "gflop": round(flops(plans[name]) / 1e9, 2)}
                for name, times in seconds.items()
            },
            "shared_over_full": round(ratio, 4),
            "shared_over_full_flops": round(expected, 4),
            "deviation": round(ratio / expected - 1, 4),
        }


def _flops(family: Any, segment: Segment, workload: Any) -> int:
    flops: int = family.segment_flops(segment, workload)
    return flops


def _fill(buffers: StepBuffers, specs: Any) -> None:
    """Inputs and constants at random; skip rows have what cond rows have."""
    generator = torch.Generator().manual_seed(0)
    for spec in specs:
        if spec.name == KEEP_ATTENTION:
            continue
        view = buffers.view(spec.name)
        view.copy_(spec.random(len(GROUPS), generator))
        if spec.has_rows:
            buffers.view(spec.name, ("skip",)).copy_(buffers.view(spec.name, ("cond",)))
    buffers.view("timestep").fill_(500.0)


def _verify(runners: dict[str, StepRunner], buffers: StepBuffers) -> float:
    """Raises GateMissed unless the shared plan's predictions are the full one's: the sharing is exact."""
    predictions = {}
    for name in ("full", "shared"):
        buffers.view("pred").zero_()
        runners[name].enqueue()
        predictions[name] = buffers.view("pred").clone()
    difference = float((predictions["full"] - predictions["shared"]).abs().max())
    moved = float((predictions["full"][1] - predictions["full"][2]).abs().max())
    if not (difference <= _MAX_ABS and moved > _MAX_ABS):
        raise GateMissed(
            f"step: expected the shared plan within {_MAX_ABS} of the full one and a skip row that differs, "
            f"got {difference:.1e} and {moved:.1e}: do not trust timings of these engines"
        )
    return difference


def _time(runners: dict[str, StepRunner], rounds: int) -> dict[str, list[float]]:
    """Seconds per step, the plans taking turns so that drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for i in range(_WARMUPS + rounds):
        for name, runner in runners.items():
            start = time.perf_counter()
            runner.enqueue()
            if i >= _WARMUPS:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['model']}, one step on {result['backend']}", title_justify="left")
    for column in ("plan", "median ms", "p10", "p90", "GFLOP"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    for name, row in result["timings"].items():
        table.add_row(name, *(f"{row[key]:.1f}" for key in ("median_ms", "p10_ms", "p90_ms", "gflop")))
    console = Console()
    console.print(table)
    console.print(
        f"shared / full: {result['shared_over_full']:.3f} measured, "
        f"{result['shared_over_full_flops']:.3f} by FLOPs ({result['deviation']:+.1%})"
    )
