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

from stg_trt.errors import InvalidRequest
from stg_trt.models.plan import plan_step
from stg_trt.models.segment import Segment
from stg_trt.runtime.device import Device

from . import record
from .clock import Times, Work, alternate, paired_ratio, synchronize
from .eager_step import EagerStep, perturbed_skip_row
from .loaded_build import LoadedBuild
from .memory import memory_in_use, working_bytes
from .roofline import Floor, measure_floor
from .scenario import Inputs, Scenario
from .verify import Reference, by_group, load_model

PEERS = ("eager", "compiled")
OURS = "stg_trt"


@dataclass(frozen=True)
class Candidate:
    """One of those that are compared; `loaded_bytes` is what its weights and buffers take."""

    work: Work
    flops: int
    loaded_bytes: int


@dataclass
class Comparison:
    """What all entrants share: the request, the step, the reference that each must meet."""

    scenario: Scenario
    inputs: Inputs
    device: Device
    reference: Reference
    entrants: dict[str, Candidate] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)

    def enter_ours(self, loaded: LoadedBuild) -> None:
        """The engines, captured where the device can; raises GateMissed where their predictions are off."""
        scenario = self.scenario
        program: Any = loaded.program(
            plan_step(loaded.sampler.segments, scenario.passes, scenario.perturbation)
        )
        if self.device.captures:
            program = loaded.captured(program)
        loaded.measure_memory()
        self.errors[OURS] = self.reference.check(OURS, loaded.preds(program))
        flops = program.plan.flops(lambda segment: scenario.family.segment_flops(segment, scenario.workload))
        self.entrants[OURS] = Candidate(loaded.work(program), flops, loaded.loaded_bytes)

    def enter_peer(self, name: str, model: Any, loaded_bytes: int) -> None:
        """A diffusers transformer with its skip row perturbed; its first run may compile."""
        scenario, inputs, device = self.scenario, self.inputs, self.device
        place = device.torch_device
        with device.scope():
            eager = EagerStep(scenario, model, inputs, getattr(torch, scenario.workload.dtype), place)
            latents, earlier = inputs.noise.to(place), inputs.earlier.to(place)
            preds = by_group(eager.preds(latents, inputs.middle).float(), scenario.passes)
        self.errors[name] = self.reference.check(name, preds)
        whole = Segment("normal", 0, scenario.family.num_blocks, front=True, back=True)
        flops = len(scenario.passes) * scenario.family.segment_flops(whole, scenario.workload)

        def run() -> None:
            eager.step(latents, inputs.middle, [*earlier])

        self.entrants[name] = Candidate(Work(run), flops, loaded_bytes)

    def run(self, rounds: int) -> dict[str, Times]:
        """Times everybody who has entered, in turns."""
        return alternate({name: e.work for name, e in self.entrants.items()}, rounds, self.device)


@dataclass(frozen=True)
class PeersBenchmark:
    """A CFG+STG step of each, verified, then in alternating rounds; torch.compile comes in last."""

    scenario: Scenario
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
        scenario = self.scenario
        scenario.check()
        facts = {"layout": self.layout, "rounds": self.rounds, "compile_mode": self.compile_mode}
        left_out = [peer for peer in PEERS if peer not in self.peers]
        results = record.Record(output, "peers", **scenario.to_json(), **facts, left_out=left_out)
        device, inputs = scenario.device(), scenario.inputs()
        floor = measure_floor(device, scenario.workload.dtype)
        with ExitStack() as stack:
            root = engines or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            build = scenario.build(self.layout, root)
            before = memory_in_use(device)
            model = load_model(scenario, device)
            reference = Reference.of_step(scenario, model, inputs, device)
            model_bytes = max(0, memory_in_use(device) - before)
            stack.enter_context(perturbed_skip_row(scenario, model))
            race = Comparison(scenario, inputs, device, reference)
            race.enter_ours(LoadedBuild(scenario, build, inputs, device))
            results.add(gemm=floor.to_json(), verification_limits=reference.limits)
            for peer in (peer for peer in PEERS if peer in self.peers):
                start = time.perf_counter()
                race.enter_peer(peer, self._prepared(peer, model), model_bytes)
                synchronize(device)
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


def _timings(entrants: dict[str, Candidate], times: dict[str, Times], floor: Floor) -> dict[str, Any]:
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
