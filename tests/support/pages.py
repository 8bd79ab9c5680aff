"""The pages of the documentation and their contents."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FOLDERS = ("", "docs", "examples/moving_shapes", "benchmarks/results", "tests/goldens")
PAGES = tuple(
    sorted(path.relative_to(ROOT).as_posix() for folder in _FOLDERS for path in (ROOT / folder).glob("*.md"))
)
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def snippets(page: str, language: str) -> list[str]:
    """The page's blocks of code in a language."""
    return [body for name, body in _FENCE.findall(text(page)) if name == language]


def without_code(page: str) -> str:
    return _FENCE.sub("", text(page))


def table(page: str, first_columns: str) -> list[dict[str, str]]:
    """The rows of the page's first table whose head begins so, by the titles of its columns."""
    lines = text(page).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_columns} |"))
    titles, rows = _cells(lines[start]), []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(titles, _cells(line), strict=True)))
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]
