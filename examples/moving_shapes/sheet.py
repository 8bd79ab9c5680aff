"""The demo's picture: a column of clips for each setting, with its costs and measures below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SCALE, _GAP, _BETWEEN = 2, 16, 4
_LINE, _HEAD = 18, 32
_FONT = ImageFont.load_default(13)
_TITLE_FONT = ImageFont.load_default(15)


@dataclass(frozen=True)
class Column:
    """A setting's title, a clip (frames, height, width, 3) in 0..1 per prompt, and the lines below them."""

    title: str
    notes: tuple[str, ...]
    clips: tuple[Any, ...]


def draw_sheet(prompts: Sequence[str], columns: Sequence[Column], footer: Sequence[str]) -> Image.Image:
    """Rows are prompts, columns are settings; a cell is the first and the last frame of a clip."""
    height, width = (side * _SCALE for side in columns[0].clips[0].shape[1:3])
    cell, row = 2 * width + _BETWEEN, height + _LINE + _GAP
    below = _HEAD + len(prompts) * row
    under_notes = below + (max(len(column.notes) for column in columns) + 1) * _LINE
    size = (_GAP + len(columns) * (cell + _GAP), under_notes + len(footer) * _LINE + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for place, column in enumerate(columns):
        left = _GAP + place * (cell + _GAP)
        draw.text((left, 8), column.title, fill="black", font=_TITLE_FONT)
        _draw_lines(draw, (left, below), column.notes, "black")
        for number, clip in enumerate(column.clips):
            top = _HEAD + number * row + _LINE
            for end, frame in enumerate((clip[0], clip[-1])):
                sheet.paste(_enlarged(frame), (left + end * (width + _BETWEEN), top))
    for number, prompt in enumerate(prompts):
        draw.text((_GAP, _HEAD + number * row), prompt, fill="dimgray", font=_FONT)
    _draw_lines(draw, (_GAP, under_notes), footer, "dimgray")
    return sheet


def _draw_lines(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str], colour: str
) -> None:
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * _LINE), line, fill=colour, font=_FONT)


def _enlarged(frame: Any) -> Image.Image:
    image = Image.fromarray((frame * 255).round().clip(0, 255).astype(np.uint8))
    return image.resize((image.width * _SCALE, image.height * _SCALE), Image.Resampling.NEAREST)
