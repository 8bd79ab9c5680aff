"""The jobs in one SQLite table, which survives the end of the process at any moment."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stg_trt.errors import InvalidRequest

from .job import WAITING, Job, Result
from .refusal import Refusal, invalid
from .video_request import ResolvedRequest

SCHEMA_VERSION = 2
MAX_ATTEMPTS = 2
_TABLE = """
CREATE TABLE IF NOT EXISTS videos (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL DEFAULT 'queued',
    request TEXT NOT NULL,
    has_reference INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    completed_at INTEGER,
    expires_at INTEGER,
    error_code TEXT,
    error_message TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    fence INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0,
    sha256 TEXT,
    inference_time_s REAL,
    peak_memory_mb REAL,
    stages TEXT
)
"""
_IS_WAITING = "status IN ('queued', 'in_progress')"


@dataclass(frozen=True)
class Page:
    """Part of the list of jobs."""

    jobs: tuple[Job, ...]
    has_more: bool


class JobStore:
    """Used by several threads, one at a time. A result is removed `expire_s` seconds after it was made."""

    def __init__(self, path: Path, expire_s: float) -> None:
        self._expire_s = expire_s
        self._lock = threading.Lock()
        self._reserved: set[str] = set()
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA_VERSION):
                raise InvalidRequest(
                    f"data: expected jobs of schema version {SCHEMA_VERSION} in {path}, got {version}: "
                    "choose another folder"
                )
            self._db.execute(_TABLE)
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except sqlite3.Error as error:
            raise InvalidRequest(
                f"data: expected a database of jobs in {path}, got {error}: choose another folder"
            ) from error

    def close(self) -> None:
        """Nothing can be asked afterwards."""
        with self._lock:
            self._db.close()

    def add(
        self, id: str, request: ResolvedRequest, has_reference: bool, max_queue: int, retry_s: int
    ) -> Job:
        """A new job at the end of the queue; raises Refusal 429, with `retry_s`, if the queue is full."""
        with self._transaction():
            if self._count("status = 'queued'") >= max_queue:
                raise Refusal(
                    429,
                    f"queue: expected fewer than {max_queue} waiting videos, got {max_queue}: try again in "
                    f"{retry_s} s",
                    code="queue_full",
                    headers={"Retry-After": str(retry_s)},
                )
            self._db.execute(
                "INSERT INTO videos (id, request, has_reference, created_at) VALUES (?, ?, ?, ?)",
                (id, request.model_dump_json(exclude_none=True), has_reference, int(time.time())),
            )
            return self._one("id = ?", id)

    def get(self, id: str) -> Job | None:
        """A job that has not expired."""
        with self._lock:
            return self._find("id = ? AND (expires_at IS NULL OR expires_at > ?)", id, time.time())

    def page(self, after: str | None, limit: int, *, newest_first: bool) -> Page:
        """Jobs that follow the job `after`; raises Refusal if there is none of that name."""
        order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
        with self._lock:
            where, values = "(expires_at IS NULL OR expires_at > ?)", [time.time()]
            if after is not None:
                row = self._db.execute("SELECT number FROM videos WHERE id = ?", (after,)).fetchone()
                if row is None:
                    raise invalid("after", f"expected the id of a video, got {after[:80]!r}: correct it")
                where, values = f"{where} AND number {beyond} ?", [*values, row["number"]]
            rows = self._db.execute(
                f"SELECT * FROM videos WHERE {where} ORDER BY number {order} LIMIT ?", (*values, limit + 1)
            ).fetchall()
        return Page(tuple(map(_job, rows[:limit])), len(rows) > limit)

    def reserve(self) -> Job | None:
        """The job that has waited longest, for one worker of this process; None if none waits for one."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM videos WHERE status = 'queued' ORDER BY number").fetchall()
            first = next((row for row in rows if row["id"] not in self._reserved), None)
            if first is None:
                return None
            self._reserved.add(first["id"])
            return _job(first)

    def unreserve(self, job: Job) -> None:
        """Its worker has ended with it; if it waits still, another may have it."""
        with self._lock:
            self._reserved.discard(job.id)

    def claim(self, id: str) -> Job | None:
        """A job that waited, now in progress; None if it waits no more."""
        with self._transaction():
            changed = self._db.execute(
                "UPDATE videos SET status = 'in_progress', attempts = attempts + 1, fence = fence + 1 "
                "WHERE id = ? AND status = 'queued'",
                (id,),
            )
            return self._one("id = ?", id) if changed.rowcount else None

    def complete(self, job: Job, result: Result) -> bool:
        """Records a result; False if the job is no longer this worker's: cancelled or deleted."""
        now = int(time.time())
        return self._finish(
            job,
            "status = 'completed', completed_at = ?, expires_at = ?, bytes = ?, sha256 = ?, "
            "inference_time_s = ?, peak_memory_mb = ?, stages = ?",
            (
                now,
                int(now + self._expire_s),
                result.bytes,
                result.sha256,
                result.seconds,
                result.peak_memory_mb,
                json.dumps(dict(result.stages)),
            ),
        )

    def fail(self, job: Job, code: str, message: str) -> bool:
        """Records why a claimed job has no video; False as `complete`."""
        now = int(time.time())
        return self._finish(
            job,
            "status = 'failed', completed_at = ?, expires_at = ?, error_code = ?, error_message = ?",
            (now, int(now + self._expire_s), code, message),
        )

    def release(self, job: Job) -> bool:
        """Puts a claimed job back to its place in the queue, as if it had not been tried."""
        return self._finish(job, "status = 'queued', attempts = attempts - 1", ())

    def cancel(self, id: str) -> bool:
        """Fails a job that waits or runs; False if it does neither."""
        now = int(time.time())
        with self._transaction():
            changed = self._db.execute(
                "UPDATE videos SET status = 'failed', completed_at = ?, expires_at = ?, error_code = "
                f"'cancelled', error_message = 'The video was cancelled.' WHERE id = ? AND {_IS_WAITING}",
                (now, int(now + self._expire_s), id),
            )
            return changed.rowcount == 1

    def delete(self, id: str) -> None:
        """Forgets a job."""
        with self._transaction():
            self._db.execute("DELETE FROM videos WHERE id = ?", (id,))

    def delete_expired(self) -> list[str]:
        """Forgets the jobs whose time is over; returns their ids."""
        with self._transaction():
            rows = self._db.execute(
                "DELETE FROM videos WHERE expires_at <= ? RETURNING id", (time.time(),)
            ).fetchall()
            return [row["id"] for row in rows]

    def recover(self) -> None:
        """After a start: jobs that were running when the last process ended wait again, or have failed."""
        with self._transaction():
            self._retry("", ())

    def retry(self, job: Job) -> Literal["retried", "interrupted"] | None:
        """A claimed job waits again, or has failed as often as it may; None as `complete` is False."""
        with self._transaction():
            if not self._retry("AND id = ? AND fence = ?", (job.id, job.fence)):
                return None
            return "retried" if self._one("id = ?", job.id).status == "queued" else "interrupted"

    def _retry(self, which: str, values: tuple[object, ...]) -> int:
        """How many of the jobs in progress it changed."""
        now = int(time.time())
        failed = self._db.execute(
            "UPDATE videos SET status = 'failed', completed_at = ?, expires_at = ?, error_code = "
            f"'interrupted', error_message = ? WHERE status = 'in_progress' AND attempts >= ? {which}",
            (
                now,
                int(now + self._expire_s),
                f"The server ended {MAX_ATTEMPTS} times while it made this video.",
                MAX_ATTEMPTS,
                *values,
            ),
        )
        waiting = self._db.execute(
            f"UPDATE videos SET status = 'queued' WHERE status = 'in_progress' {which}", values
        )
        return failed.rowcount + waiting.rowcount

    def ids(self, *, waiting: bool) -> set[str]:
        """The jobs that wait or run, or those that are completed."""
        where = _IS_WAITING if waiting else "status = 'completed'"
        with self._lock:
            return {row["id"] for row in self._db.execute(f"SELECT id FROM videos WHERE {where}")}

    def waiting(self) -> dict[str, int]:
        """How many jobs are queued, and how many in progress."""
        with self._lock:
            return {status: self._count(f"status = '{status}'") for status in WAITING}

    def result_bytes(self) -> int:
        """Of all results on disk."""
        with self._lock:
            total: int = self._db.execute("SELECT coalesce(sum(bytes), 0) FROM videos").fetchone()[0]
            return total

    def _finish(self, job: Job, changes: str, values: tuple[object, ...]) -> bool:
        with self._transaction():
            changed = self._db.execute(
                f"UPDATE videos SET {changes} WHERE id = ? AND fence = ? AND status = 'in_progress'",
                (*values, job.id, job.fence),
            )
            return changed.rowcount == 1

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _count(self, where: str) -> int:
        count: int = self._db.execute(f"SELECT count(*) FROM videos WHERE {where}").fetchone()[0]
        return count

    def _find(self, where: str, *values: object) -> Job | None:
        row = self._db.execute(f"SELECT * FROM videos WHERE {where}", values).fetchone()
        return None if row is None else _job(row)

    def _one(self, where: str, *values: object) -> Job:
        found = self._find(where, *values)
        assert found is not None
        return found


def _job(row: sqlite3.Row) -> Job:
    result = None
    if row["sha256"] is not None:
        result = Result(
            row["bytes"],
            row["sha256"],
            row["inference_time_s"],
            row["peak_memory_mb"],
            json.loads(row["stages"]),
        )
    return Job(
        id=row["id"],
        status=row["status"],
        request=ResolvedRequest.model_validate_json(row["request"]),
        has_reference=bool(row["has_reference"]),
        created_at=row["created_at"],
        completed_at=row["completed_at"],
        expires_at=row["expires_at"],
        error_code=row["error_code"],
        error_message=row["error_message"],
        attempts=row["attempts"],
        fence=row["fence"],
        result=result,
    )
