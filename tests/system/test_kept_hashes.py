"""Hashes of large files: kept while a file looks the same, and never where that can be mistaken."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from stg_trt.system import kept_hashes
from stg_trt.system.kept_hashes import cache_folder, kept_sha256


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STG_TRT_CACHE", str(tmp_path / "cache"))


def written(path: Path, data: bytes, seconds_ago: float = 60) -> Path:
    path.write_bytes(data)
    then = time.time() - seconds_ago
    os.utime(path, (then, then))
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_file_is_read_once(hashed_files: list[Path], tmp_path: Path) -> None:
    path = written(tmp_path / "weights", b"first")
    link = tmp_path / "link"
    link.symlink_to(path)
    assert [kept_sha256(path), kept_sha256(path), kept_sha256(link)] == [sha256(b"first")] * 3
    assert hashed_files == [path]
    assert kept_sha256(path, whole=True) == sha256(b"first") and len(hashed_files) == 2


@pytest.mark.parametrize(("data", "seconds_ago"), [(b"other", 50), (b"longer than that", 60)])
def test_a_changed_file_is_read_again(
    hashed_files: list[Path], tmp_path: Path, data: bytes, seconds_ago: float
) -> None:
    path = written(tmp_path / "weights", b"first")
    kept_sha256(path)
    assert kept_sha256(written(path, data, seconds_ago)) == sha256(data)
    assert len(hashed_files) == 2


def test_a_hash_of_a_file_that_has_just_changed_is_not_kept(hashed_files: list[Path], tmp_path: Path) -> None:
    """It may change again within the same step of the file system's clock."""
    path = written(tmp_path / "weights", b"first", seconds_ago=0.5)
    stat = path.stat()
    kept_sha256(path)
    path.write_bytes(b"other")
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert kept_sha256(path) == sha256(b"other") and len(hashed_files) == 2


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    hashed_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "weights", b"first")

    def slow(path: Path) -> str:
        written(path, b"other", 30)
        return sha256(b"first")

    with monkeypatch.context() as patched:
        patched.setattr(kept_hashes, "file_sha256", slow)
        kept_sha256(path)
    assert not list(cache_folder().glob("*"))
    assert kept_sha256(path) == sha256(b"other")


@pytest.mark.parametrize("record", [b"", b"[]", b"{}", b"\xff", b'{"sha256": 3}', b"null"])
def test_a_damaged_record_counts_as_none(hashed_files: list[Path], tmp_path: Path, record: bytes) -> None:
    path = written(tmp_path / "weights", b"first")
    kept_sha256(path)
    (kept,) = cache_folder().iterdir()
    kept.write_bytes(record)
    assert kept_sha256(path) == sha256(b"first") and len(hashed_files) == 2


def test_a_cache_that_cannot_be_written_is_no_error(hashed_files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    path = written(tmp_path / "weights", b"first")
    assert [kept_sha256(path), kept_sha256(path)] == [sha256(b"first")] * 2
    assert len(hashed_files) == 2
