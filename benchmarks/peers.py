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

from stg_trt.errors import StgTrtError
from stg_trt.models.plan import plan_step
from stg_trt.models.segment import Segment
from stg_trt.runtime.device import Device

from . import record
from .clock import Times, Work, alternate, median_ratio, synchronize
from .diffusers_models import diffusers_model
from .eager_step import EagerStep, perturbed_skip_row
from .loaded_build import LoadedBuild
from .memory import memory_in_use, working_bytes
from .peer_models import PEERS, check_peers
from .roofline import PeakMatmul, format_share, measure_peak_matmul
from .scenario import Inputs, Scenario
from .verify import Reference, Verdict, load_model, rows_by_pass

OURS = "stg_trt"
_MOST_OF_A_REASON = 300


@dataclass(frozen=True)
class Candidate:
    """One way to run the step; `loaded_bytes` is the memory of its weights and buffers."""

    work: Work
    flops: int
    loaded_bytes: int


@dataclass
class Comparison:
    """The common part of all candidates: the request, the step, the reference that each must meet."""

    scenario: Scenario
    inputs: Inputs
    device: Device
    reference: Reference
    candidates: dict[str, Candidate] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    def add_ours(self, loaded: LoadedBuild) -> None:
        """Adds the engines, captured if the device can."""
        scenario = self.scenario
        step: Any = loaded.step(plan_step(loaded.sampler.segments, scenario.passes))
        if self.device.captures:
            step = loaded.captured(step)
        loaded.measure_memory()
        self.verdicts[OURS] = self.reference.check(OURS, loaded.preds(step))
        flops = step.plan.flops(lambda segment: scenario.family.segment_flops(segment, scenario.workload))
        self.candidates[OURS] = Candidate(loaded.work(step), flops, loaded.loaded_bytes)

    def add_peer(self, name: str, model: Any, loaded_bytes: int) -> None:
        """A diffusers transformer with its skip row perturbed, unless its predictions are off.

        Its first run may compile.
        """
        scenario, inputs, device = self.scenario, self.inputs, self.device
        place = device.torch_device
        with device.scope():
            eager = EagerStep(scenario, model, inputs, getattr(torch, scenario.workload.dtype), place)
            latents, earlier = inputs.noise.to(place), inputs.earlier.to(place)
            preds = rows_by_pass(eager.preds(latents, inputs.middle).float(), scenario.passes)
        self.verdicts[name] = self.reference.check(name, preds)
        if self.verdicts[name].doubts:
            return
        whole = Segment("normal", 0, scenario.family.num_blocks, front=True, back=True)
        flops = len(scenario.passes) * scenario.family.segment_flops(whole, scenario.workload)

        def run() -> None:
            eager.step(latents, inputs.middle, [*earlier])

        # A graph that torch.compile captured overwrites its outputs in the next step alone.
        work = Work(run, torch.compiler.cudagraph_mark_step_begin)
        self.candidates[name] = Candidate(work, flops, loaded_bytes)

    def run(self, rounds: int) -> dict[str, Times]:
        """Times all candidates, in turns."""
        return alternate({name: each.work for name, each in self.candidates.items()}, rounds, self.device)


@dataclass(frozen=True)
class PeersBenchmark:
    """A step of each, verified, then in alternating rounds; the quickest to prepare come first."""

    scenario: Scenario
    peers: tuple[str, ...]
    layout: str
    rounds: int

    def __post_init__(self) -> None:
        check_peers(self.peers)

    def run(self, output: Path, engines: Path | None) -> None:
        """Builds, verifies, times, prints a table and writes the JSON; what is done before a cut is kept."""
        scenario = self.scenario
        scenario.check()
        facts = {
            "layout": self.layout,
            "rounds": self.rounds,
            "passes": [one.name for one in scenario.passes],
            "peers_model": diffusers_model(scenario.family).source,
        }
        left_out = {peer: "not named by --peers" for peer in PEERS if peer not in self.peers}
        results = record.Record(output, "peers", **scenario.to_json(), **facts, left_out=left_out)
        device, inputs = scenario.device(), scenario.inputs()
        peak = measure_peak_matmul(device, scenario.workload.dtype)
        with ExitStack() as stack:
            root = engines or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            build = scenario.build(self.layout, root)
            before = memory_in_use(device)
            model = load_model(scenario, device)
            reference = Reference.of_step(scenario, model, inputs, device)
            model_bytes = max(0, memory_in_use(device) - before)
            stack.enter_context(perturbed_skip_row(scenario, model))
            comparison = Comparison(scenario, inputs, device, reference)
            comparison.add_ours(LoadedBuild(scenario, build, inputs, device))
            results.add(peak_matmul=peak.to_json(), verification_limits=reference.limits_to_json())
            results.distrust((*reference.doubts, *comparison.verdicts[OURS].doubts))
            for peer in (peer for peer in PEERS if peer in self.peers):
                start = time.perf_counter()
                reason = _add(peer, comparison, model, model_bytes)
                if reason is not None:
                    results.add(left_out={**results.result["left_out"], peer: reason})
                    continue
                results.add(**{f"{peer}_first_run_s": round(time.perf_counter() - start, 1)})
                times = comparison.run(self.rounds)
                results.add(timings=_timings(comparison.candidates, times, peak), **_ratios(times))
                results.add(verification={n: v.to_json() for n, v in comparison.verdicts.items()})
            for name, candidate in comparison.candidates.items() if "timings" in results.result else ():
                working = working_bytes(candidate.work, device)
                results.result["timings"][name]["peak_bytes"] = candidate.loaded_bytes + working
        _print(results.result)
        results.finish()


def _add(peer: str, comparison: Comparison, model: Any, loaded_bytes: int) -> str | None:
    """Adds one peer, or says why it is left out: it cannot run here, or it predicts something else."""
    try:
        comparison.add_peer(peer, PEERS[peer](model), loaded_bytes)
        synchronize(comparison.device)
    except StgTrtError as error:
        return str(error)
    except Exception as error:
        # Compilers raise whatever they please; the other peers are measured all the same.
        return " ".join(f"{type(error).__name__}: {error}".split())[:_MOST_OF_A_REASON]
    return "; ".join(comparison.verdicts[peer].doubts) or None


def _timings(
    candidates: dict[str, Candidate], times: dict[str, Times], peak: PeakMatmul
) -> dict[str, dict[str, Any]]:
    """Percentiles of each, its own operations and their roofline."""
    rows = {}
    for name, candidate in candidates.items():
        row = record.percentiles(times[name].device_s)
        rows[name] = {
            **row,
            "gflop": round(candidate.flops / 1e9, 4),
            "roofline_ms": round(peak.ms(candidate.flops), 4),
            "mfu": peak.mfu(candidate.flops, row["median_ms"]),
        }
    return rows


def _ratios(times: dict[str, Times]) -> dict[str, float]:
    """How many times as long as ours each peer takes."""
    return {
        f"{name}_over_{OURS}": round(median_ratio(peer, times[OURS]), 4)
        for name, peer in times.items()
        if name != OURS
    }


def _print(result: dict[str, Any]) -> None:
    passes = "+".join(result["passes"])
    table = Table(title=f"{result['model']}, one step of {passes}, in one batch", title_justify="left")
    for column in ("", "median ms", "p10", "p90", "MFU", "x ours", "peak MB"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["timings"].items():
        times = (f"{row[key]:.2f}" for key in ("median_ms", "p10_ms", "p90_ms"))
        ratio = result.get(f"{name}_over_{OURS}", 1.0)
        table.add_row(
            name, *times, format_share(row["mfu"]), f"{ratio:.2f}", f"{row['peak_bytes'] / 1e6:.0f}"
        )
    console = Console()
    console.print(table)
    console.print(f"the peers' model: {result['peers_model']}")
    for peer, reason in result["left_out"].items():
        console.print(f"left out: {peer}: {reason}")
