"""The tables of an evaluation, and the plot of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PARTS = ("texture", "colour", "shape", "direction", "all")
MEASURES = {
    "all": "share of clips right in all four",
    "overlap": "overlap with the perfect shape",
    "jitter": "distance from a straight path (px)",
}


HEAD = (
    "guidance",
    "passes per step",
    "texture",
    "colour",
    "shape",
    "direction",
    "all four",
    "overlap",
    "jitter (px)",
)


def table(report: dict[str, Any]) -> str:
    """The results as Markdown, with the machine they were measured on."""
    rows = [_cells(row) for row in report["results"]]
    return f"{_markdown(HEAD, rows)}\n{_request(report)}\n"


def picture_table(report: dict[str, Any]) -> str:
    """The results of clips that begin with pictures as Markdown, and how far their first frames are off."""
    rows = [(*_cells(row), f"{row['first_frame_error']:.2f}") for row in report["results"]]
    kept = f"The VAE alone changes a picture by {report['vae_error']:.2f} levels of 255."
    return f"{_markdown((*HEAD, 'first frame'), rows)}\n{kept} {_request(report)}\n"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    shares = (f"{100 * row[part]:.0f} %" for part in PARTS)
    quality = (f"{row['overlap']:.3f}", f"{row['jitter']:.2f}")
    return (row["name"], f"{row['passes_per_step']:.2f}", *shares, *quality)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), "|".join(["---"] * len(head)), *(" | ".join(row) for row in rows)]
    return "".join(f"|{line}|\n" if line.startswith("---") else f"| {line} |\n" for line in lines)


def _request(report: dict[str, Any]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    request = f"{report['clips']} clips per row, {report['steps']} steps, the same noise in every row."
    return f"{request} Measured with: {machine}."


def plot(report: dict[str, Any], path: Path) -> None:
    """Measures against the STG scale: a panel per measure, a line for each mode and block."""
    rows = report["results"]
    cfg = next(row for row in rows if row["cfg_scale"] > 1 and row["stg_scale"] == 0)
    none = next(row for row in rows if row["cfg_scale"] <= 1)
    guided = [row for row in rows if row["stg_scale"] > 0]
    lines = sorted({(row["stg_mode"], row["stg_block"]) for row in guided})
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for panel, (name, label) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        panel.axhline(none[name], color="grey", linestyle=":", label="no guidance")
        for mode, block in lines:
            chosen = [cfg, *(row for row in guided if (row["stg_mode"], row["stg_block"]) == (mode, block))]
            x, y = [row["stg_scale"] for row in chosen], [row[name] for row in chosen]
            style = "-" if mode == "stg-a" else "--"
            panel.plot(x, y, style, marker="o", markersize=3, label=f"{mode.upper()}, block {block}")
        panel.set_title(label)
        panel.set_xlabel(f"STG scale (0: {cfg['name']} alone)")
        panel.grid(alpha=0.3)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)
