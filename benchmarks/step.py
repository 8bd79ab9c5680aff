"""One sampling step: CFG+STG with the shared prefix, in full, as twins, and CFG alone; graph on and off."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from stg_trt.models.plan import StepPlan, full_plan, plan_step
from stg_trt.models.segment import Segment
from stg_trt.runtime.device import Device
from stg_trt.runtime.graph import StepGraph
from stg_trt.runtime.step import Step

from . import record
from .clock import Times, alternate, median_ratio
from .launches import count_launches
from .loaded_build import LoadedBuild
from .memory import working_bytes
from .roofline import PeakMatmul, format_share, measure_peak_matmul
from .scenario import Scenario
from .verify import Reference, finite_or_none, load_model, relative_l2

NO_GRAPH = " (no graph)"


@dataclass(frozen=True)
class Variant:
    """One way to run the step: a plan of a layout, captured or not."""

    loaded: LoadedBuild
    step: Step | StepGraph

    @property
    def flops(self) -> int:
        """Operations of the engines in one step."""
        family, manifest = self.loaded.sampler.family, self.loaded.build.manifest
        return self.step.plan.flops(lambda segment: family.segment_flops(segment, manifest.workload))


@dataclass(frozen=True)
class StepBenchmark:
    """Times plans in alternating rounds, after comparing their predictions with the eager model's."""

    scenario: Scenario
    layouts: tuple[str, ...]
    rounds: int

    def run(self, output: Path, engines: Path | None) -> None:
        """Builds, verifies, times, prints a table and writes the JSON; a layout that is done is kept."""
        scenario = self.scenario
        scenario.check()
        results = record.Record(output, "step", **scenario.to_json(), rounds=self.rounds)
        device = scenario.device()
        inputs = scenario.inputs()
        peak = measure_peak_matmul(device, scenario.workload.dtype)
        model = load_model(scenario, device)
        reference = Reference.of_step(scenario, model, inputs, device)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        results.add(
            peak_matmul=peak.to_json(), verification_limits=reference.limits_to_json(), model_bytes=weights
        )
        results.distrust(reference.doubts)
        del model
        variants: dict[str, Variant] = {}
        with ExitStack() as stack:
            root = engines or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for layout in self.layouts:
                build = scenario.build(layout, root)
                added = _variants(LoadedBuild(scenario, build, inputs, device), scenario, device)
                _verify(added, reference, results)
                variants |= added
                times = alternate(
                    {n: v.loaded.work(v.step) for n, v in variants.items()}, self.rounds, device
                )
                results.add(**_timings(variants, times, peak), **_ratios(variants, times))
            _count(results, variants, device)
        _print(results.result)
        results.finish()


def _plans(layout: str, segments: Sequence[Segment], scenario: Scenario) -> dict[str, StepPlan]:
    """The plans of a layout by name; cfg is what is left without the skip pass."""
    passes = scenario.passes
    cfg = plan_step(segments, passes[:-1])
    stg = plan_step(segments, passes)
    if layout == "twin":
        return {"twin": stg, "twin cfg": cfg}
    return {"shared": stg, "full": full_plan(segments, passes), "cfg": cfg}


def _variants(loaded: LoadedBuild, scenario: Scenario, device: Device) -> dict[str, Variant]:
    """Every plan of a layout; if the device captures, as a graph and again without one."""
    layout = loaded.build.manifest.layout
    variants = {}
    for name, plan in _plans(layout, loaded.sampler.segments, scenario).items():
        step = loaded.step(plan)
        if device.captures:
            variants[name] = Variant(loaded, loaded.captured(step))
            name += NO_GRAPH
        variants[name] = Variant(loaded, step)
    loaded.measure_memory()
    return variants


def _verify(variants: dict[str, Variant], reference: Reference, results: record.Record) -> None:
    """Records the relative L2 of every variant's rows, and a doubt for each that is wrong."""
    preds = {name: variant.loaded.preds(variant.step) for name, variant in variants.items()}
    verdicts = {name: reference.check(name, rows) for name, rows in preds.items()}
    errors = {name: verdict.to_json() for name, verdict in verdicts.items()}
    results.add(verification={**results.result.get("verification", {}), **errors})
    results.distrust(doubt for verdict in verdicts.values() for doubt in verdict.doubts)
    if "full" in preds and "shared" in preds:
        _compare(preds["shared"], preds["full"], reference.limits, results)


def _compare(
    shared: dict[str, Tensor], full: dict[str, Tensor], limits: dict[str, float], results: record.Record
) -> None:
    """Records how far the shared plan's rows are from the full one's, and a doubt if that is too far."""
    errors = {name: relative_l2(shared[name], full[name]) for name in limits}
    results.distrust(
        f"shared: expected {name} within a relative L2 of {limits[name]:.1e} of the full plan's, "
        f"got {error:.1e}"
        for name, error in errors.items()
        if not error <= limits[name]
    )
    worst = max(float((shared[name] - full[name]).abs().max()) for name in limits)
    results.add(max_abs_shared_against_full=finite_or_none(worst))


def _timings(variants: dict[str, Variant], times: dict[str, Times], peak: PeakMatmul) -> dict[str, Any]:
    """Percentiles of each variant, its operations and their roofline; one entry per layout."""
    rows = {}
    for name, variant in variants.items():
        row: dict[str, Any] = record.percentiles(times[name].device_s)
        nodes = variant.step.nodes if isinstance(variant.step, StepGraph) else 0
        rows[name] = {
            **row,
            **record.percentiles(times[name].host_s, "host_"),
            "gflop": round(variant.flops / 1e9, 4),
            "roofline_ms": round(peak.ms(variant.flops), 4),
            "mfu": peak.mfu(variant.flops, row["median_ms"]),
            "layout": variant.loaded.build.manifest.layout,
            "graph_nodes": nodes,
        }
    layouts = {v.loaded.build.manifest.layout: v.loaded.to_json() for v in variants.values()}
    return {"timings": rows, "layouts": layouts}


def _ratios(variants: dict[str, Variant], times: dict[str, Times]) -> dict[str, float]:
    """Ratios of the plans' costs, measured in pairs and by operations."""
    ratios = {}
    pairs = (
        ("shared_over_full", "shared", "full"),
        ("stg_over_cfg", "shared", "cfg"),
        ("shared_over_twin", "shared", "twin"),
        ("twin_over_cfg", "twin", "twin cfg"),
        ("graph_over_no_graph", "shared", f"shared{NO_GRAPH}"),
    )
    for key, above, below in pairs:
        if above in times and below in times:
            ratios[key] = round(median_ratio(times[above], times[below]), 4)
            ratios[f"{key}_flops"] = round(variants[above].flops / variants[below].flops, 4)
    if "shared_over_full" in ratios:
        ratios["deviation"] = round(ratios["shared_over_full"] / ratios["shared_over_full_flops"] - 1, 4)
    return ratios


def _count(results: record.Record, variants: dict[str, Variant], device: Device) -> None:
    """Memory of a run of each variant; on a GPU then its launches, since a profiler may disturb graphs."""
    works = {name: variant.loaded.work(variant.step) for name, variant in variants.items()}
    rows = results.result["timings"]
    for name, variant in variants.items():
        rows[name]["peak_bytes"] = variant.loaded.loaded_bytes + working_bytes(works[name], device)
    results.add()
    if device.torch_device.type == "cuda":
        for name, work in works.items():
            rows[name] |= count_launches(work, device).to_json()
            results.add()


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['model']}, one step on {result['backend']}", title_justify="left")
    for column in ("plan", "median ms", "p10", "p90", "GFLOP", "MFU", "peak MB"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    for name, row in result["timings"].items():
        times = (f"{row[key]:.2f}" for key in ("median_ms", "p10_ms", "p90_ms", "gflop"))
        table.add_row(name, *times, format_share(row["mfu"]), f"{row['peak_bytes'] / 1e6:.0f}")
    console = Console()
    console.print(table)
    if "shared_over_full" in result:
        console.print(
            f"shared / full: {result['shared_over_full']:.3f} measured, "
            f"{result['shared_over_full_flops']:.3f} by FLOPs ({result['deviation']:+.1%})"
        )
        console.print(
            f"STG / CFG: {result['stg_over_cfg']:.3f} measured, {result['stg_over_cfg_flops']:.3f} by FLOPs"
        )
