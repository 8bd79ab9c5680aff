"""The step beside what users have today: diffusers, eager and compiled, with all passes in one batch."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stg_trt.device import Device
from stg_trt.errors import InvalidRequest
from stg_trt.segment import Segment
from stg_trt.step_plan import plan_step

from . import record
from .clock import Times, Work, alternate, paired_ratio, settle
from .eager import EagerStep, perturbed_skip_row
from .floor import Floor, measure_floor
from .memory import memory_in_use, working_bytes
from .setting import Inputs, Setting
from .subject import Subject
from .verify import Reference, by_group, load_model

PEERS = ("eager", "compiled")
OURS = "stg_trt"


@dataclass(frozen=True)
class Entrant:
    """One of those that are compared; `loaded_bytes` is what its weights and buffers take."""

    work: Work
    flops: int
    loaded_bytes: int


@dataclass
class Race:
    """What all entrants share: the request, the step, the reference that each must meet."""

    setting: Setting
    inputs: Inputs
    device: Device
    reference: Reference
    entrants: dict[str, Entrant] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)

    def enter_ours(self, subject: Subject) -> None:
        """The engines, captured where the device can; raises GateMissed where their predictions are off."""
        setting = self.setting
        program: Any = subject.program(
            plan_step(subject.sampler.segments, setting.passes, setting.perturbation)
        )
        if self.device.captures:
            program = subject.captured(program)
        subject.weigh()
        self.errors[OURS] = self.reference.check(OURS, subject.preds(program))
        flops = program.plan.flops(lambda segment: setting.family.segment_flops(segment, setting.workload))
        self.entrants[OURS] = Entrant(subject.work(program), flops, subject.loaded_bytes)

    def enter_peer(self, name: str, model: Any, loaded_bytes: int) -> None:
        """A diffusers transformer with its skip row perturbed; its first run may compile."""
        setting, inputs, device = self.setting, self.inputs, self.device
        place = device.torch_device
        with device.scope():
            eager = EagerStep(setting, model, inputs, getattr(torch, setting.workload.dtype), place)
            latents, earlier = inputs.noise.to(place), inputs.earlier.to(place)
            preds = by_group(eager.preds(latents, inputs.middle).float(), setting.passes)
        self.errors[name] = self.reference.check(name, preds)
        whole = Segment("normal", 0, setting.family.num_blocks, front=True, back=True)
        flops = len(setting.passes) * setting.family.segment_flops(whole, setting.workload)

        def run() -> None:
            eager.step(latents, inputs.middle, [*earlier])

        self.entrants[name] = Entrant(Work(run), flops, loaded_bytes)

    def run(self, rounds: int) -> dict[str, Times]:
        """Times everybody who has entered, in turns."""
        return alternate({name: e.work for name, e in self.entrants.items()}, rounds, self.device)


@dataclass(frozen=True)
class PeersBenchmark:
    """A CFG+STG step of each, verified, then in alternating rounds; torch.compile comes in last."""

    setting: Setting
    peers: tuple[str, ...]
    compile_mode: str
    layout: str
    rounds: int

    def __post_init__(self) -> None:
        unknown = sorted(set(self.peers) - set(PEERS))
        if unknown or not self.peers:
            raise InvalidRequest(
                f"peers: expected some of {', '.join(PEERS)}, got {', '.join(unknown) or 'none'}: "
                "correct them"
            )

    def run(self, output: Path, engines: Path | None) -> None:
        """Builds, verifies, times, prints a table and writes the JSON; what is done before a cut is kept."""
        setting = self.setting
        setting.check()
        facts = {"layout": self.layout, "rounds": self.rounds, "compile_mode": self.compile_mode}
        left_out = [peer for peer in PEERS if peer not in self.peers]
        results = record.Record(output, "peers", **setting.to_json(), **facts, left_out=left_out)
        device, inputs = setting.device(), setting.inputs()
        floor = measure_floor(device, setting.workload.dtype)
        with ExitStack() as stack:
            root = engines or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            build = setting.build(self.layout, root)
            before = memory_in_use(device)
            model = load_model(setting, device)
            reference = Reference.of_step(setting, model, inputs, device)
            model_bytes = max(0, memory_in_use(device) - before)
            stack.enter_context(perturbed_skip_row(setting, model))
            race = Race(setting, inputs, device, reference)
            race.enter_ours(Subject(setting, build, inputs, device))
            results.add(gemm=floor.to_json(), verification_limits=reference.limits)
            for peer in (peer for peer in PEERS if peer in self.peers):
                start = time.perf_counter()
                race.enter_peer(peer, self._prepared(peer, model), model_bytes)
                settle(device)
                results.add(verification=race.errors, **{f"{peer}_first_run_s": time.perf_counter() - start})
                times = race.run(self.rounds)
                results.add(timings=_timings(race.entrants, times, floor), **_ratios(times))
            for name, entrant in race.entrants.items():
                working = working_bytes(entrant.work, device)
                results.result["timings"][name]["peak_bytes"] = entrant.loaded_bytes + working
            results.finish()
        _print(results.result)

    def _prepared(self, peer: str, model: Any) -> Any:
        return torch.compile(model, mode=self.compile_mode, dynamic=False) if peer == "compiled" else model


def _timings(entrants: dict[str, Entrant], times: dict[str, Times], floor: Floor) -> dict[str, Any]:
    """Percentiles of each, and its share of the floor of its own operations."""
    rows = {}
    for name, entrant in entrants.items():
        row = record.percentiles(times[name].device_s)
        rows[name] = {
            **row,
            "gflop": round(entrant.flops / 1e9, 2),
            "floor_ms": round(floor.ms(entrant.flops), 4),
            "share_of_floor": round(floor.ms(entrant.flops) / row["median_ms"], 4),
        }
    return rows


def _ratios(times: dict[str, Times]) -> dict[str, float]:
    """How many times as long as ours each peer takes."""
    return {
        f"{name}_over_{OURS}": round(paired_ratio(peer, times[OURS]), 4)
        for name, peer in times.items()
        if name != OURS
    }


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['model']}, one STG step, all passes in one batch", title_justify="left")
    for column in ("", "median ms", "p10", "p90", "of the floor", "x ours", "peak MB"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["timings"].items():
        times = (f"{row[key]:.2f}" for key in ("median_ms", "p10_ms", "p90_ms"))
        ratio = result.get(f"{name}_over_{OURS}", 1.0)
        table.add_row(
            name, *times, f"{row['share_of_floor']:.0%}", f"{ratio:.2f}", f"{row['peak_bytes'] / 1e6:.0f}"
        )
    console = Console()
    console.print(table)
    if result["left_out"]:
        console.print(f"left out by --peers: {', '.join(result['left_out'])}")
