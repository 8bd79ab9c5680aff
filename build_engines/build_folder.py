"""A build's folder: made, locked against other builders, and removed again if nothing was built."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from stg_trt.errors import InvalidRequest

LOCK_NAME = ".lock"
_FOREVER = -1


@contextmanager
def fresh_folder(folder: Path) -> Iterator[None]:
    """Makes a folder with its parents; in the end removes those made here that stayed empty.

    Raises InvalidRequest if it cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    _make(folder)
    try:
        yield
    finally:
        # The first that has something in it, such as another builder's work, stays with all above it.
        with suppress(OSError):
            for path in made:
                path.rmdir()


@contextmanager
def locked_folder(folder: Path, on_wait: Callable[[Path], None]) -> Iterator[None]:
    """Makes a folder and holds its lock; calls `on_wait` before it waits for another builder.

    In the end a folder with nothing but its lock is removed.
    """
    lock = _lock(folder, on_wait)
    try:
        yield
    finally:
        with suppress(OSError):
            if os.listdir(folder) == [LOCK_NAME]:
                (folder / LOCK_NAME).unlink()
                # If someone has locked a new file of that name since, the folder is not empty and stays.
                folder.rmdir()
        lock.release()


def _lock(folder: Path, on_wait: Callable[[Path], None]) -> FileLock:
    """Holds the lock file that lies in the folder now, not one that its last holder has removed."""
    path, timeout = folder / LOCK_NAME, 0
    while True:
        try:
            _make(folder)
            with path.open("a") as named:
                lock = FileLock(path)
                lock.acquire(timeout=timeout)
                # While the open file still has its name, no other file of that name can have been locked.
                if os.path.samestat(os.fstat(named.fileno()), path.stat()):
                    return lock
                lock.release()
        except Timeout:
            on_wait(folder)
            timeout = _FOREVER
        except FileNotFoundError:
            # Its last holder has removed the folder since it was made here.
            continue


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InvalidRequest(
            f"output: expected a folder that can be written, got {folder} ({error.strerror}): choose another"
        ) from error
    if not os.access(folder, os.W_OK):
        # FileNotFoundError if another builder has removed it since.
        folder.stat()
        raise InvalidRequest(f"output: expected a folder that can be written, got {folder}: choose another")
