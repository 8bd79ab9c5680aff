"""One mistake: a change to one file, and the tests that must fail with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mistake:
    """`name` says what is wrong; `old` occurs once in `file`; `tests` are ids that pytest takes."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @contextmanager
    def planted(self, root: Path) -> Iterator[None]:
        """The checkout at `root` with the mistake, restored afterwards."""
        path = root / self.file
        text = path.read_text("utf-8")
        assert text.count(self.old) == 1, (
            f"{self.file}: expected once, got {text.count(self.old)}: {self.old}"
        )
        path.write_text(text.replace(self.old, self.new), "utf-8")
        try:
            yield
        finally:
            path.write_text(text, "utf-8")
