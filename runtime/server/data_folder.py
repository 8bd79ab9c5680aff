"""The folder of a server: its database, its pictures and videos, and the lock of the process that uses it."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Literal

from filelock import FileLock, Timeout
from PIL import Image

from stg_trt.errors import InvalidRequest
from stg_trt.system.files import write_atomically

Variant = Literal["video", "thumbnail", "spritesheet"]
SUFFIXES: dict[Variant, str] = {"video": ".mp4", "thumbnail": ".webp", "spritesheet": ".jpg"}
_ID = re.compile(r"video_[0-9a-f]{32}")


class DataFolder:
    """Held by one process, until it is closed; for `wait_s` it waits for another process to do so.

    Names of files are made of ids that the server has drawn, and of nothing else.
    """

    def __init__(self, root: Path, wait_s: float = 0) -> None:
        try:
            for folder in (root, root / "videos", root / "references"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(
                f"data: expected a folder that can be written, got {root} ({error.strerror}): choose another"
            ) from error
        if not os.access(root, os.W_OK):
            raise InvalidRequest(f"data: expected a folder that can be written, got {root}: choose another")
        self._root = root
        self._held = FileLock(root / ".lock")
        try:
            self._held.acquire(timeout=wait_s)
        except Timeout as error:
            raise InvalidRequest(
                f"data: expected a folder that no other server uses, got {root}: stop that one, or choose "
                "another folder"
            ) from error

    @property
    def database(self) -> Path:
        """Of the jobs."""
        return self._root / "jobs.sqlite3"

    def __enter__(self) -> DataFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Another process may use it."""
        self._held.release()

    def result(self, id: str, variant: Variant) -> Path:
        """A file of a finished job."""
        return self._root / "videos" / f"{_checked(id)}{SUFFIXES[variant]}"

    def save_result(self, id: str, variant: Variant, data: bytes) -> None:
        """A file that another process has made, whole or not at all."""
        write_atomically(self.result(id, variant), data)

    def save_reference(self, id: str, picture: Image.Image) -> None:
        """Keeps the picture of a job, without loss."""
        data = io.BytesIO()
        picture.save(data, "PNG")
        write_atomically(self._reference(id), data.getvalue())

    def load_reference(self, id: str) -> Image.Image:
        """The picture of a job."""
        with Image.open(self._reference(id), formats=("PNG",)) as picture:
            return picture.convert("RGB")

    def remove_reference(self, id: str) -> None:
        """Once a job is over."""
        self._reference(id).unlink(missing_ok=True)

    def remove(self, id: str) -> None:
        """All files of a job."""
        self.remove_reference(id)
        for variant in SUFFIXES:
            self.result(id, variant).unlink(missing_ok=True)

    def sweep(self, completed: Collection[str], waiting: Collection[str]) -> None:
        """Removes files that belong to no job, such as half-written ones of a killed process."""
        for folder, known in (("videos", completed), ("references", waiting)):
            for path in (self._root / folder).iterdir():
                if path.stem not in known:
                    path.unlink()

    def _reference(self, id: str) -> Path:
        return self._root / "references" / f"{_checked(id)}.png"


def is_id(text: str) -> bool:
    """True if a text has the form of a job's id."""
    return _ID.fullmatch(text) is not None


def _checked(id: str) -> str:
    assert is_id(id), id
    return id
