"""Bars of a step's milliseconds, a panel per result, with the floor of each one's operations."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from stg_trt.system.files import write_atomically

_OURS, _OTHERS, _FLOOR = "#2a6fbb", "#9aa5b1", "#d1495b"
_WIDTH, _BAR_HEIGHT, _PANEL_MARGIN = 8.0, 0.32, 1.1


def save_plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes a PNG; every result has timings."""
    heights = [_BAR_HEIGHT * len(result["timings"]) + _PANEL_MARGIN for result in results]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(len(results), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, result in zip(axes, results, strict=True):
        _panel(axis, result)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_atomically(path, image.getvalue())


def _panel(axis: Any, result: dict[str, Any]) -> None:
    rows = result["timings"]
    names, medians = list(rows), [row["median_ms"] for row in rows.values()]
    spread = [
        [row["median_ms"] - row["p10_ms"] for row in rows.values()],
        [row["p90_ms"] - row["median_ms"] for row in rows.values()],
    ]
    colours = [_OTHERS if name in ("eager", "compiled") else _OURS for name in names]
    axis.barh(names, medians, color=colours, xerr=spread, ecolor="#444444", capsize=2, height=0.7)
    floors = [row["floor_ms"] for row in rows.values()]
    axis.scatter(floors, range(len(names)), marker="|", s=160, color=_FLOOR, zorder=3, label="floor")
    axis.invert_yaxis()
    axis.set_xlim(0, None)
    axis.set_xlabel("ms per step; bars from p10 to p90, the red line is the floor of the operations")
    size = result["workload"]
    machine = result["gpu"]["name"] if result["gpu"] else result["processor"]
    axis.set_title(
        f"{result['benchmark']}: {result['model']} {size['width']}x{size['height']}x{size['num_frames']}, "
        f"{result['backend']}, {machine}",
        fontsize=9,
        loc="left",
    )
