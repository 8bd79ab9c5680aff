"""Bars of a step's milliseconds, a panel per result, with the roofline of each one's operations."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from stg_trt.system.files import write_atomically

from .peer_models import PEERS

_OURS, _OTHERS, _ROOFLINE = "#2a6fbb", "#9aa5b1", "#d1495b"
_WIDTH, _BAR_HEIGHT, _PANEL_MARGIN = 8.0, 0.32, 1.1


def save_plot(panels: Sequence[tuple[str, dict[str, Any]]], path: Path) -> None:
    """Writes a PNG with a panel per (title, result); every result has timings."""
    heights = [_BAR_HEIGHT * len(result["timings"]) + _PANEL_MARGIN for _, result in panels]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (title, result) in zip(axes, panels, strict=True):
        _draw(axis, title, result)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_atomically(path, image.getvalue())


def _draw(axis: Any, title: str, result: dict[str, Any]) -> None:
    rows = result["timings"]
    names, medians = list(rows), [row["median_ms"] for row in rows.values()]
    spread = [
        [row["median_ms"] - row["p10_ms"] for row in rows.values()],
        [row["p90_ms"] - row["median_ms"] for row in rows.values()],
    ]
    colours = [_OTHERS if name in PEERS else _OURS for name in names]
    axis.barh(names, medians, color=colours, xerr=spread, ecolor="#444444", capsize=2, height=0.7)
    roofline = [row["roofline_ms"] for row in rows.values()]
    axis.scatter(roofline, range(len(names)), marker="|", s=160, color=_ROOFLINE, zorder=3)
    axis.invert_yaxis()
    axis.set_xlim(0, None)
    axis.set_xlabel("ms per step; bars from p10 to p90, the red line is the roofline of the operations")
    machine = result["gpu"]["name"] if result["gpu"] else result["processor"]
    axis.set_title(f"{title}, {machine}", fontsize=9, loc="left")
