"""The demo's sheet: a column of clips for each setting, with its costs and measures below."""

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
class Row:
    """A prompt, and the picture (height, width, 3) in 0..1 that its clips begin with, if there is one."""

    prompt: str
    picture: Any = None


@dataclass(frozen=True)
class Column:
    """A setting's title, a clip (frames, height, width, 3) in 0..1 per row, and the lines below them."""

    title: str
    notes: tuple[str, ...]
    clips: tuple[Any, ...]


def draw_sheet(rows: Sequence[Row], columns: Sequence[Column], footer: Sequence[str]) -> Image.Image:
    """The rows' pictures, then a column for each setting; a cell is a clip's first and last frame."""
    height, width = (side * _SCALE for side in columns[0].clips[0].shape[1:3])
    cell, step = 2 * width + _BETWEEN, height + _LINE + _GAP
    lefts = [2 * _GAP + width + place * (cell + _GAP) for place in range(len(columns))]
    tops = [_HEAD + number * step for number in range(len(rows) + 1)]
    under_notes = tops[-1] + (max(len(column.notes) for column in columns) + 1) * _LINE
    size = (lefts[-1] + cell + _GAP, under_notes + len(footer) * _LINE + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, top in zip(rows, tops, strict=False):
        draw.text((lefts[0], top), row.prompt, fill="dimgray", font=_FONT)
        if row.picture is not None:
            draw.text((_GAP, top), "picture", fill="dimgray", font=_FONT)
            sheet.paste(_enlarged(row.picture), (_GAP, top + _LINE))
    for column, left in zip(columns, lefts, strict=True):
        draw.text((left, 8), column.title, fill="black", font=_TITLE_FONT)
        _draw_lines(draw, (left, tops[-1]), column.notes, "black")
        for clip, top in zip(column.clips, tops, strict=False):
            for end, frame in enumerate((clip[0], clip[-1])):
                sheet.paste(_enlarged(frame), (left + end * (width + _BETWEEN), top + _LINE))
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
