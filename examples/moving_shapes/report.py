"""The table of an evaluation, and the plot of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PARTS = ("colour", "shape", "direction", "all")
MEASURES = {
    "all": "share of clips right in all three",
    "overlap": "overlap with the perfect shape",
    "jitter": "distance from a straight path (px)",
}


def table(report: dict[str, Any]) -> str:
    """The results as Markdown, with the machine they were measured on."""
    lines = [
        "| guidance | passes per step | colour | shape | direction | all three | overlap | jitter (px) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["results"]:
        shares = " | ".join(f"{100 * row[part]:.0f} %" for part in PARTS)
        quality = f"{row['overlap']:.3f} | {row['jitter']:.2f}"
        lines.append(f"| {row['name']} | {row['passes_per_step']:.2f} | {shares} | {quality} |")
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    request = f"{report['clips']} clips per row, {report['steps']} steps, the same noise in every row."
    lines += ["", f"{request} Measured with: {machine}."]
    return "\n".join(lines) + "\n"


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
