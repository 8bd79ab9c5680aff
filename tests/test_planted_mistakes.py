"""The list of planted mistakes is up to date: `make mistakes` can plant each, and finds the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.planted_mistakes import MISTAKES
from tests.planted_mistakes.mistake import Mistake

ROOT = Path(__file__).parents[1]


def test_every_mistake_can_be_planted() -> None:
    found = {f"{m.file}: {m.name}": (ROOT / m.file).read_text("utf-8").count(m.old) for m in MISTAKES}
    assert len(found) == len(MISTAKES)
    assert not {name: count for name, count in found.items() if count != 1}


def test_the_tests_that_must_notice_them_are_there() -> None:
    missing = []
    for test in {test for mistake in MISTAKES for test in mistake.tests}:
        path, _, name = test.partition("::")
        if f"def {name.partition('[')[0]}" not in (ROOT / path).read_text("utf-8"):
            missing.append(test)
    assert not missing


def test_the_file_is_restored(tmp_path: Path) -> None:
    mistake = Mistake("a sum is a difference", "code.py", "a + b", "a - b", ())
    (tmp_path / "code.py").write_text("print(a + b)")
    with pytest.raises(ZeroDivisionError), mistake.planted(tmp_path):
        assert (tmp_path / "code.py").read_text() == "print(a - b)"
        raise ZeroDivisionError
    assert (tmp_path / "code.py").read_text() == "print(a + b)"
