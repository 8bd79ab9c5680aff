"""Draws docs/shared_prefix.svg: which blocks a CFG+STG step computes, in full and with the shared prefix.

Run it from the checkout: python docs/shared_prefix.py
"""

from __future__ import annotations

from pathlib import Path

BLOCKS, PERTURBED = 28, 19  # LTX-Video 2B
PASSES = ("uncond", "cond", "skip")
LEFT, PITCH, SIZE, ROW = 96, 25, 21, 30
WIDTH, HEIGHT = 840, 330
# It brings its own background, so that it can be read on a light page and on a dark one.
STYLE = """
  .page { fill: #ffffff; stroke: #d0d7de } .words { fill: #1f2328 } .quiet { fill: #59636e }
  .computed { fill: #2f81f7 } .perturbed { fill: #db6d28 } .absent { fill: none; stroke: #afb8c1 }
  .line { stroke: #59636e; fill: none } .arrow { stroke: #db6d28; fill: none } .tip { fill: #db6d28 }
  text { font: 14px -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif }
  .title { font-size: 15px; font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #3d444d } .words { fill: #f0f6fc } .quiet { fill: #9198a1 }
    .absent { stroke: #656c76 } .line { stroke: #9198a1 }
  }
"""


def drawing() -> str:
    """The whole picture as SVG."""
    full, shared = 44, 182
    parts = [
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
        _title(
            full,
            f"All three passes in full (LTX-Video 2B, {BLOCKS} blocks)",
            f"{3 * BLOCKS} block runs per step",
        ),
        *(_pass(full, row, shares=False) for row in range(len(PASSES))),
        _title(
            shared,
            "stg_trt: the skip pass starts at its first perturbed block",
            f"{3 * BLOCKS - PERTURBED} block runs, the same result",
        ),
        *(_pass(shared, row, shares=True) for row in range(len(PASSES))),
        _copy(shared),
        *_engines(shared),
    ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img">\n<title>The skip pass shares its prefix with the conditional pass'
        f"</title>\n<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def _title(top: int, title: str, count: str) -> str:
    right = LEFT + BLOCKS * PITCH
    return (
        f'<text class="words title" x="16" y="{top - 16}">{title}</text>'
        f'<text class="quiet" x="{right}" y="{top - 16}" text-anchor="end">{count}</text>'
    )


def _pass(top: int, row: int, *, shares: bool) -> str:
    """A row of blocks; in the shared drawing the skip row has none before the perturbed one."""
    y = top + row * ROW
    cells = [f'<text class="words" x="{LEFT - 16}" y="{y + 15}" text-anchor="end">{PASSES[row]}</text>']
    for block in range(BLOCKS):
        skip = PASSES[row] == "skip"
        if shares and skip and block < PERTURBED:
            continue
        kind = "perturbed" if skip and block == PERTURBED else "computed"
        x = LEFT + block * PITCH
        cells.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{SIZE}" height="{SIZE}" rx="3"/>')
    return "".join(cells)


def _copy(top: int) -> str:
    """The part of the skip row that is not computed, and the arrow from the conditional row into the rest."""
    x, y = LEFT + PERTURBED * PITCH - (PITCH - SIZE) / 2, top + ROW + SIZE / 2
    end = top + 2 * ROW + SIZE / 2
    width = (PERTURBED - 1) * PITCH - (PITCH - SIZE)
    note = LEFT + width / 2
    return (
        f'<rect class="absent" x="{LEFT}.5" y="{top + 2 * ROW}.5" width="{width - 1}" '
        f'height="{SIZE - 1}" rx="3" stroke-dasharray="4 4"/>'
        f'<path class="arrow" stroke-width="2" d="M {x - 14} {y + SIZE / 2 + 1} V {end} H {x - 3}"/>'
        f'<path class="tip" d="M {x + 2} {end} l -7 -4.5 v 9 z"/>'
        f'<text class="quiet" x="{note}" y="{end + 5}" text-anchor="middle">'
        "not computed: same latents, timestep and prompt as cond</text>"
    )


def _engines(top: int) -> list[str]:
    """Braces under the three engines."""
    y = top + 3 * ROW + 2
    ranges = (("front", 0, PERTURBED), ("block", PERTURBED, PERTURBED + 1), ("back", PERTURBED + 1, BLOCKS))
    names = {
        "front": f"engine front: blocks 0-{PERTURBED - 1}, rows uncond, cond",
        "block": f"block_{PERTURBED}",
        "back": "back: all three rows",
    }
    parts = []
    for name, start, stop in ranges:
        left, right = LEFT + start * PITCH, LEFT + stop * PITCH - (PITCH - SIZE)
        middle = (left + right) / 2
        drop = 34 if name == "block" else 17
        parts.append(f'<path class="line" d="M {left} {y} v 5 H {right} v -5"/>')
        if name == "block":
            parts.append(f'<path class="line" d="M {middle} {y + 5} v 16"/>')
        parts.append(
            f'<text class="words" x="{middle}" y="{y + 5 + drop}" text-anchor="middle">{names[name]}</text>'
        )
    return parts


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(drawing())
