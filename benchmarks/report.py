"""Results as Markdown tables and a plot, from their JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from stg_trt.errors import BackendUnavailable, InvalidRequest
from stg_trt.system.files import write_atomically
from stg_trt.system.units import GIB

from .goals import Outcome, find_outcomes, is_trusted
from .record import check_output
from .roofline import format_share

Row = dict[str, Any]

# All of them share one table; every other result has a section of its own.
_BUILD = "build"
_GPU = "gpu"


def write_report(paths: Sequence[Path], output: Path, reasons: Path | None) -> list[Path]:
    """Writes `output` (.md) and a plot of timings beside it; raises InvalidRequest for what is no result.

    A result that is not trusted is named with its reasons, and none of its numbers.
    """
    if output.suffix != ".md":
        raise InvalidRequest(f"output: expected a name ending in .md, got {output}: rename it")
    check_output(output)
    results = [result for path in paths for result in _read(path)]
    why = _read_reasons(reasons) if reasons else {}
    written = [output]
    plotted = [(_title(result), result) for result in results if result.get("timings") and is_trusted(result)]
    if plotted:
        _check_plotting()
        from .plot import save_plot

        written.append(output.with_suffix(".png"))
        save_plot(plotted, written[-1])
    text = _text(results, why, written[-1].name if plotted else None)
    write_atomically(output, text.encode())
    return written


def _read(path: Path) -> list[Row]:
    """The results in a file: one, or those of all parts of a run on a GPU after the run itself."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"report: expected a JSON result, got {path} ({error}): check it") from error
    if not isinstance(result, dict) or result.get("benchmark") not in (_BUILD, *SECTIONS):
        raise InvalidRequest(
            f"report: expected a result of stg-trt bench, got {path}: leave it out or measure again"
        )
    parts = result["parts"] if result["benchmark"] == _GPU else []
    return [result, *(part["result"] for part in parts if part.get("result"))]


def _read_reasons(path: Path) -> dict[str, str]:
    """Why a goal was missed, by the goal's name."""
    try:
        reasons = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"reasons: expected a JSON object of texts by goal, got {path} ({error}): check it"
        ) from error
    if not isinstance(reasons, dict) or not all(isinstance(text, str) for text in reasons.values()):
        raise InvalidRequest(f"reasons: expected a JSON object of texts by goal, got {path}: correct it")
    return reasons


def _check_plotting() -> None:
    """Raises BackendUnavailable without matplotlib, before anything is written."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BackendUnavailable(
            f"report: expected matplotlib for the plot, got {error}: pip install 'stg-trt[benchmarks]'"
        ) from error


def _text(results: Sequence[Row], reasons: dict[str, str], plot: str | None) -> str:
    parts = ["# Benchmarks", _goals(results, reasons)]
    if plot:
        parts.append(f"![Milliseconds of a step, with the roofline of its operations]({plot})")
    builds = [result for result in results if result["benchmark"] == _BUILD]
    if builds:
        parts.append(_builds(builds))
    for result in results:
        if result["benchmark"] == _BUILD:
            continue
        parts += [f"## {_title(result)}", _measured_on(result), _section(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _goals(results: Sequence[Row], reasons: dict[str, str]) -> str:
    """Which goals were met; a missed one with its reason."""
    rows = [
        [
            outcome.goal.name,
            outcome.result["gpu"]["name"],
            f"{'<=' if outcome.goal.at_most else '>='} {outcome.goal.bound:g}",
            *_reached(outcome, reasons),
        ]
        for outcome in find_outcomes(results)
    ]
    return _table(["goal", "GPU", "bound", "measured", ""], rows) if rows else ""


def _reached(outcome: Outcome, reasons: dict[str, str]) -> tuple[str, str]:
    """The measured value and its meaning."""
    value = outcome.value
    if value is None:
        return ("not measured" if is_trusted(outcome.result) else "not trusted"), ""
    if outcome.goal.is_met(value):
        return f"{value:.3f}", "met"
    return f"{value:.3f}", f"missed: {reasons.get(outcome.goal.name, 'reason not known yet')}"


def _section(result: Row) -> str:
    """A result's tables; of one that is not trusted the reasons alone."""
    if not is_trusted(result):
        return f"Not published, since it is not trusted: {'; '.join(result['doubts'])}."
    return "\n\n".join([SECTIONS[result["benchmark"]](result), _optimisations(result)]).rstrip()


def _optimisations(result: Row) -> str:
    """Expected and measured gains of the optimisations, as ratios of times; empty without any."""
    rows = [
        [row["name"], row["backend"], row["part"], row["derivation"], _gain(row["expected"], "no formula"),
         _gain(row["measured"], "not measured")]
        for row in result.get("optimisations", [])
    ]  # fmt: skip
    words = ["optimisation", "backend", "before / after of", "expected by"]
    return _table([*words, "expected", "measured"], rows, len(words)) if rows else ""


def _gain(ratio: float | None, otherwise: str) -> str:
    return otherwise if ratio is None else f"{ratio:.3f}x"


def _title(result: Row) -> str:
    words = ["rehearsal" if result.get("rehearsal") else result["benchmark"]]
    if "model" in result:
        words.append(_named(result))
    if "workload" in result and "width" in result["workload"]:
        size = result["workload"]
        words.append(f"{size['width']}x{size['height']}x{size['num_frames']} {size['precision']}")
    words += [result["backend"]] if "backend" in result else []
    return ", ".join(words) + ("" if result.get("complete", True) else " (cut off)")


def _measured_on(result: Row) -> str:
    gpu = result.get("gpu")
    machine = f"{result['processor']}, {result['cores']} cores"
    if gpu:
        machine = f"{gpu['name']}, driver {gpu['driver']}, CUDA {gpu['cuda']}"
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    lines = [f"{machine}; commit {result['commit']}, {result['date']}; {versions}."]
    if "peak_matmul" in result:
        peak = result["peak_matmul"]
        lines.append(
            f"MFU is of {peak['tflops']:.2f} TFLOP/s, the fastest {peak['dtype']} product: "
            f"{'x'.join(map(str, peak['shape']))} by {peak['library']}."
        )
    for name, reason in result.get("left_out", {}).items():
        lines.append(f"Left out: {name} ({reason}).")
    return " ".join(lines)


def _timings(result: Row) -> str:
    """Step and peers: percentiles, utilisation, memory, and what was counted on a GPU."""
    optional = {"kernels": "kernels", "launches": "launches", "host_syncs": "host syncs"}
    timings = result.get("timings", {})
    shown = [key for key in optional if any(key in row for row in timings.values())]
    header = [
        "",
        "median ms",
        "p10",
        "p90",
        "GFLOP",
        "MFU",
        "peak MB",
        *(optional[k] for k in shown),
    ]
    rows = [
        [
            name,
            *(f"{row[key]:.2f}" for key in ("median_ms", "p10_ms", "p90_ms")),
            f"{row['gflop']:,.1f}",
            format_share(row["mfu"]),
            f"{row['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in row else "",
            *(str(row.get(key, "")) for key in shown),
        ]
        for name, row in timings.items()
    ]
    ratios = [
        f"{key.replace('_over_', ' / ').replace('_', ' ')}: {value:.3f}"
        + (f" ({result[f'{key}_flops']:.3f} by operations)" if f"{key}_flops" in result else "")
        for key, value in result.items()
        if "_over_" in key and not key.endswith("_flops")
    ]
    return "\n\n".join([_table(header, rows), "; ".join(ratios)])


def _sample(result: Row) -> str:
    rows = []
    for name, call in result.get("calls", {}).items():
        total = [f"{call['total'][key]:.1f}" for key in ("median_ms", "p10_ms", "p90_ms")]
        steps = "; ".join(
            f"{s['count']} x {s['median_ms']:.2f} ({state})" for state, s in call["steps"].items()
        )
        rows.append([name, *total, steps, f"{call['setup_ms']:.1f}", f"{call['loop_overhead']:.1%}"])
    return _table(
        ["guidance", "total ms", "p10", "p90", "steps x ms (passes)", "set-up ms", "loop overhead"], rows
    )


def _kernels(result: Row) -> str:
    rows = [
        [
            row["name"],
            row["implementation"],
            f"{row['elements']:,}",
            f"{row['median_ms']:.4f}",
            f"{row['gb_per_s']:.0f}",
            f"{row['copy_gb_per_s']:.0f}",
            format_share(row["share_of_copy"]),
        ]
        for row in result["kernels"]
    ]
    return _table(["kernel", "", "elements", "median ms", "GB/s", "copy GB/s", "of a copy"], rows)


def _builds(results: Sequence[Row]) -> str:
    """One row per model, mode and layout: its targets share the export. Then where each was measured."""
    rows = []
    for result in results:
        alike: dict[tuple[str, ...], list[Row]] = {}
        for build in result["builds"]:
            alike.setdefault((_size(build), _stg(build), build["layout"]), []).append(build)
        rows += [[_model(result), *key, *_build_cells(builds)] for key, builds in alike.items()]
    words = ["model", "size", "STG", "layout", "targets"]
    numbers = ["s, all targets", "peak GiB", "engine MB", "fused attentions", "relative L2"]
    machines = [f"- {_model(result)}: {_measured_on(result)}" for result in results]
    return "\n\n".join(["## build", _table([*words, *numbers], rows, len(words)), "\n".join(machines)])


def _model(result: Row) -> str:
    return _named(result) + ("" if result.get("complete", True) else " (cut off)")


def _named(result: Row) -> str:
    kept = result.get("blocks")
    return str(result["model"]) + (f", {' + '.join(map(str, kept))} of its blocks" if kept else "")


def _size(build: Row) -> str:
    size = build["workload"]
    return f"{size['size']} {size['precision']}, {build['text_length']} text tokens"


def _stg(build: Row) -> str:
    return f"{build['stg_mode']} {','.join(map(str, build['stg_blocks']))}"


def _fewest(counts: Sequence[int | None]) -> int | str:
    known = [count for count in counts if count is not None]
    return min(known) if len(known) == len(counts) else "unknown"


def _build_cells(builds: Sequence[Row]) -> list[str]:
    """Costs of one export's targets: the highest if they differ, and the fewest fused attentions."""
    checks = [check for build in builds for part in build["segments"] for check in part["verification"]]
    wanted = sum(segment["attentions"] for segment in builds[0]["segments"])
    return [
        ", ".join(build["target"] for build in builds),
        f"{builds[0]['wall_s_all_targets']:,.0f}",
        f"{max(build['peak_bytes'] for build in builds) / GIB:.1f}",
        f"{max(build['engine_bytes'] for build in builds) / 1e6:,.0f}",
        f"{_fewest([build['fused_attentions'] for build in builds])} of {wanted}",
        f"{max(check['relative_l2'] for check in checks):.0e}" if checks else "",
    ]


def _foreign_engine(result: Row) -> str:
    stages = ", ".join(result.get("stages", [])) or "none"
    return f"An engine for {result['target']}; stages reached: {stages}. The answer: `{result.get('answer')}`"


def _gpu_parts(result: Row) -> str:
    """How each part of a run ended; a rehearsal says first that it is one."""
    parts = result["parts"]
    rows = [[part["name"], part["ended"], _test_counts(part), f"{part['seconds']:.0f}"] for part in parts]
    table = _table(["part", "ended", "tests", "s"], rows, 3)
    return f"{result['rehearsal']}\n\n{table}" if result.get("rehearsal") else table


def _test_counts(part: Row) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in part.get("tests", {}).items())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Markdown; the first `words` columns are text, the others numbers."""
    lines = [header, ["---"] * words + ["---:"] * (len(header) - words), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


SECTIONS: dict[str, Callable[[Row], str]] = {
    "step": _timings,
    "peers": _timings,
    "sample": _sample,
    "kernels": _kernels,
    "foreign-engine": _foreign_engine,
    _GPU: _gpu_parts,
}
