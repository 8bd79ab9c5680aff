"""Folders of builds: who holds one, and what is left of one in which nothing was built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from stg_trt.build_engines import build_folder
from stg_trt.build_engines.build_folder import LOCK_NAME, fresh_folder, locked_folder
from tests.support.cli import ROOT

# Holds the folder again and again, alone as long as a file of its own shows; leaves nothing in it.
HOLDER = """
import os, sys, time
from pathlib import Path
from stg_trt.build_engines.build_folder import locked_folder

folder, alone = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(30):
    with locked_folder(folder, lambda folder: None):
        os.close(os.open(alone, os.O_CREAT | os.O_EXCL))
        (folder / "work").mkdir()
        time.sleep(0.02)
        (folder / "work").rmdir()
        alone.unlink()
"""


def test_what_was_made_and_is_empty_is_removed(tmp_path: Path) -> None:
    with fresh_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())


def test_what_was_there_or_has_something_in_it_stays(tmp_path: Path) -> None:
    with fresh_folder(tmp_path), fresh_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]


@pytest.mark.parametrize("before", [[], [LOCK_NAME]])
def test_a_failure_leaves_no_folder(tmp_path: Path, before: list[str]) -> None:
    """Nor that of an earlier builder, which was killed."""
    folder = tmp_path / "engines" / "build"
    for name in before:
        folder.mkdir(parents=True)
        (folder / name).touch()
    with pytest.raises(ZeroDivisionError), locked_folder(folder, lambda folder: None):
        assert os.listdir(folder) == [LOCK_NAME]
        raise ZeroDivisionError
    assert not folder.exists()


def test_what_was_built_stays_with_its_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked_folder(tmp_path / "build", lambda folder: None):
        (tmp_path / "build" / "text.onnx").touch()
        raise ZeroDivisionError
    assert {*os.listdir(tmp_path / "build")} == {LOCK_NAME, "text.onnx"}


def test_a_lock_file_that_another_builder_has_removed_is_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was opened before, and is locked after; by then its name is that of another's."""
    path = tmp_path / LOCK_NAME
    removed: list[int] = []

    class Late(FileLock):
        def acquire(self, *args: Any, **options: Any) -> Any:
            held = super().acquire(*args, **options)
            if not removed:
                removed.append(path.stat().st_ino)
                path.unlink()
                path.touch()
            return held

    monkeypatch.setattr(build_folder, "FileLock", Late)
    with locked_folder(tmp_path, lambda folder: None):
        with pytest.raises(Timeout):
            FileLock(path).acquire(timeout=0)
        (tmp_path / "text.onnx").touch()
    assert removed
    FileLock(path).acquire(timeout=0).lock.release()


def test_a_removed_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    command = (sys.executable, "-c", HOLDER, tmp_path / "build", tmp_path / "alone")
    holders = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)]
    errors = [holder.communicate(timeout=120)[1] for holder in holders]
    assert [holder.returncode for holder in holders] == [0] * 4, errors
    assert not list(tmp_path.iterdir())
