"""`stg-trt inspect`: what is in an engine folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stg_trt.engines.reused import REUSED

if TYPE_CHECKING:
    from stg_trt.engines.manifest import Manifest
    from stg_trt.engines.store import Build
    from stg_trt.models.passes import Pass


def inspect(
    engines: Annotated[Path, typer.Argument(help="A folder made by stg-trt build.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    commands: Annotated[
        bool, typer.Option("--commands", help="Print trtexec and polygraphy lines that build the same.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every engine file and compare its hash.")
    ] = False,
) -> None:
    """Show the builds in a folder: segments, rows, FLOPs, attention kernels, keys and sizes."""
    from stg_trt.engines.store import EngineStore

    store = EngineStore.open(engines)
    store.check_has_builds()
    if verify:
        for found in store.builds:
            found.check_files(whole=True)
    builds = [describe(build) for build in store.builds]
    if as_json:
        print(json.dumps({"builds": builds, "unreadable": store.unreadable}, indent=1))
        return
    from rich.console import Console

    console = Console(emoji=False)
    for build in builds:
        _print(console, build)
        if commands:
            _print_commands(build)
    for folder, reason in store.unreadable.items():
        console.print(f"{folder}: unusable: {reason}", style="red", markup=False)


def describe(build: Build) -> dict[str, Any]:
    """The facts of a build, ready for JSON."""

    manifest = build.manifest
    family = manifest.model
    states = _states(build)
    return {
        "folder": build.folder.name,
        "complete": manifest.complete,
        **manifest.model_dump(
            mode="json",
            include={
                "family", "backend", "target", "gpu", "layout", "stg_mode", "stg_blocks", "max_batch",
                "workload", "weights", "lora", "versions", "stg_trt_version",
                "export_version",
            },
        ),
        "float8": None if manifest.float8 is None else manifest.float8.model_dump(mode="json"),
        "guidance_states": states,
        "segments": [
            {
                "name": record.segment.name,
                "expert": record.segment.expert + 1,
                "blocks": [record.segment.start, record.segment.stop],
                "rows": {state: rows["rows"].get(record.segment.name, 0) for state, rows in states.items()},
                "flops_per_row": family.segment_flops(record.segment, manifest.workload),
                "attentions": record.attentions,
                "fused_attentions": record.fused_attentions,
                "attention_kernels": list(record.attention_kernels),
                "activation_bytes": record.activation_bytes,
                "bytes": record.engine_bytes,
                "relative_l2": max((v.relative_l2 for v in record.verification), default=None),
                "float8_error": None if manifest.float8 is None
                else manifest.float8.segments.get(record.segment.name),
                "key": record.key,
                "graph_sha256": record.graph_sha256,
                "profiles": record.facts["profiles"],
                "commands": record.commands,
                "seconds": record.seconds,
                "peak_bytes": record.peak_bytes,
                "reused": list(record.reused),
            }
            for record in manifest.segments
        ],
    }  # fmt: skip


def _states(build: Build) -> dict[str, dict[str, Any]]:
    """Per guidance state: rows per segment, and FLOPs of one video's step, shared and in full."""
    from stg_trt.models.plan import plan_step
    from stg_trt.models.segment import blocks_of_expert

    manifest = build.manifest
    family = manifest.model
    segments = [record.segment for record in manifest.segments]
    experts = {segment.expert for segment in segments}

    def flops(segment: Any) -> int:
        return family.segment_flops(segment, manifest.workload)

    whole = [segment for segment in blocks_of_expert(segments, 0) if not segment.skipped]
    states = {}
    for name, passes in _passes(manifest, distilled=family.embedded_guidance is not None).items():
        plans = [plan_step(segments, passes, expert) for expert in sorted(experts)]
        rows: dict[str, int] = {}
        for run in (run for plan in plans for run in plan.runs):
            rows[run.segment.name] = rows.get(run.segment.name, 0) + len(run.passes)
        states[name] = {
            "rows": rows,
            # A step runs one expert, all of the same cost.
            "flops": plans[0].flops(flops),
            "flops_full": len(passes) * sum(map(flops, whole)),
        }
    return states


def _passes(manifest: Manifest, *, distilled: bool) -> dict[str, tuple[Pass, ...]]:
    """The passes of the guidance states: without STG, with each skip pass, with all; with isolation too."""
    from stg_trt.models.passes import COND, ISOLATION, UNCOND, Pass
    from stg_trt.models.perturbation import Perturbation

    skips = [Pass(name, Perturbation(manifest.stg_mode, blocks)) for name, blocks in manifest.skips.items()]
    guided = (COND,) if distilled else (UNCOND, COND)
    states: dict[str, tuple[Pass, ...]] = {"cond": (COND,)}
    if not distilled:
        states["cfg"] = guided
    prefix = "" if distilled else "cfg+"
    if len(skips) > 1:
        states |= {f"{prefix}{one.name}": (*guided, one) for one in skips}
    if skips:
        states[f"{prefix}stg"] = (*guided, *skips)
    if manifest.model.isolates:
        states[f"{prefix}stg+isolation"] = (*guided, ISOLATION, *skips)
    return states


def _print_float8(console: Any, build: dict[str, Any]) -> None:
    """What FP8 keeps, and what it changes at each step of its calibration; nothing for other builds."""
    from rich.table import Table

    found = build["float8"]
    if found is None:
        return
    prompts = "random text" if found["prompts"] is None else f"{len(found['prompts'])} prompts"
    console.print(
        f"fp8: {len(found['largest_inputs'])} layers, calibrated on {prompts} in {found['num_steps']} steps; "
        f"blocks kept whole: {', '.join(map(str, found['kept_blocks'])) or 'none'}"
    )
    table = Table(title="Relative errors by FP8")
    names = sorted({name for step in found["steps"] for name in step["skip"]})
    for column in ("timestep", "cond", "guided", *(f"cond - {name}" for name in names), "along"):
        table.add_column(column, justify="right")
    for step in found["steps"]:
        errors = (step["pred"], step["guided"], *(step["skip"].get(name) for name in names))
        along = ", ".join(f"{value:.3f}" for value in step["along"].values())
        table.add_row(f"{step['timestep']:.1f}", *map(_shown, errors), along or "-")
    console.print(table)


def _shown(error: float | None) -> str:
    return "-" if error is None else f"{error:.3f}"


def _print_commands(build: dict[str, Any]) -> None:
    """Prints one command per line and nothing else, ready to copy; run them in the build's folder."""
    for segment in build["segments"]:
        for command in segment["commands"]:
            print(command)


def _compiled_for(build: dict[str, Any]) -> str:
    gpu = build["gpu"]
    return f"{gpu['name']} with driver {gpu['driver']}" if gpu else str(build["target"])


def _print(console: Any, build: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    workload = build["workload"]
    size = f"{workload['width']}x{workload['height']}x{workload['num_frames']}"
    console.print(
        f"[bold]{escape(build['folder'])}[/bold]: {build['family']}, {size}, "
        f"{workload['text_length']} text tokens, {workload['precision']}, {build['layout']}, "
        f"{build['stg_mode']} {build['stg_blocks']}, at most {build['max_batch']} videos, "
        f"{build['backend']} for {_compiled_for(build)}"
        + ("" if build["complete"] else " [red](not finished)[/red]")
    )
    table = Table()
    rows = f"rows {' / '.join(build['guidance_states'])}"
    fp8 = ("FP8 error",) if build["float8"] else ()
    for column in ("segment", rows, "GFLOP per row", "attentions", "MB", "L2", *fp8, "key"):
        table.add_column(column, justify="left" if column in ("segment", "key") else "right")
    for segment in build["segments"]:
        error, fused = segment["relative_l2"], segment["fused_attentions"]
        table.add_row(
            segment["name"],
            " / ".join(str(rows) for rows in segment["rows"].values()),
            f"{segment['flops_per_row'] / 1e9:.2f}",
            f"{'?' if fused is None else fused}/{segment['attentions']}",
            f"{segment['bytes'] / 1e6:.1f}",
            "-" if error is None else f"{error:.0e}",
            *(_shown(segment["float8_error"]) for _ in fp8),
            segment["key"][:12],
        )
    console.print(table)
    for what, name in REUSED.items():
        segments = [segment["name"] for segment in build["segments"] if what in segment["reused"]]
        if segments:
            console.print(f"{name}: {', '.join(segments)}", markup=False)
    _print_float8(console, build)
    for name, state in build["guidance_states"].items():
        ratio = state["flops"] / state["flops_full"]
        console.print(
            f"{name}: {state['flops'] / 1e9:.1f} GFLOP per step and video, {ratio:.3f} of all passes in full"
        )
