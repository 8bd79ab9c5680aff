"""The table of jobs: claims that were overtaken, processes that ended, files that are something else."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from stg_trt.errors import InvalidRequest
from stg_trt.runtime.server.data_folder import DataFolder
from stg_trt.runtime.server.job import Job, Result
from stg_trt.runtime.server.job_store import JobStore
from stg_trt.runtime.server.video_request import ResolvedRequest

REQUEST = ResolvedRequest(
    prompt="a", model="m", width=64, height=48, num_frames=9, fps=8.0, seed=2**63 - 1, stg_scale={"a": [1.0]}
)
RESULT = Result(100, "ab", 1.5, None, {"denoise": 1.0, "encode": 0.5})


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite3", expire_s=3600)


def add(store: JobStore, number: int) -> Job:
    return store.add(f"video_{number:032x}", REQUEST, False, 10, 1)


def claim(store: JobStore) -> Job:
    waiting = store.reserve()
    assert waiting is not None
    store.unreserve(waiting)
    job = store.claim(waiting.id)
    assert job is not None and store.claim(waiting.id) is None
    return job


def test_jobs_are_claimed_in_their_order(store: JobStore) -> None:
    added = [add(store, number) for number in (3, 1, 2)]
    claimed = [claim(store) for _ in added]
    assert [job.id for job in claimed] == [job.id for job in added] and store.reserve() is None
    assert claimed[0].request == REQUEST and claimed[0].status == "in_progress"


def test_a_claim_that_was_overtaken_writes_nothing(store: JobStore) -> None:
    add(store, 1)
    old = claim(store)
    store.recover()
    new = claim(store)
    assert (new.attempts, new.fence) == (2, 2)
    assert not store.complete(old, RESULT) and not store.fail(old, "x", "y") and not store.release(old)
    assert store.complete(new, RESULT)
    done = store.get(new.id)
    assert done is not None and done.status == "completed" and done.result == RESULT
    assert not store.cancel(new.id)


def test_a_job_is_interrupted_twice_at_most(store: JobStore, tmp_path: Path) -> None:
    add(store, 1)
    for _ in range(2):
        claim(store)
        store.close()
        store = JobStore(tmp_path / "jobs.sqlite3", expire_s=3600)
        store.recover()
    assert store.reserve() is None
    job = store.get(f"video_{1:032x}")
    assert job is not None and (job.status, job.error_code) == ("failed", "interrupted")
    assert job.error_message == "The server ended 2 times while it made this video."


def test_a_job_of_a_lost_worker_is_interrupted_twice_at_most(store: JobStore) -> None:
    add(store, 1), add(store, 2)
    first, other = claim(store), claim(store)
    assert store.retry(first) == "retried" and store.retry(first) is None
    again = claim(store)
    assert (again.id, again.attempts) == (first.id, 2)
    assert store.retry(first) is None and store.retry(again) == "interrupted"
    assert store.complete(other, RESULT)


def test_a_reserved_job_is_one_workers(store: JobStore) -> None:
    added = [add(store, number) for number in (1, 2)]
    first, second = store.reserve(), store.reserve()
    assert [first, second, store.reserve()] == [*added, None]
    store.cancel(added[0].id)
    assert store.claim(added[0].id) is None
    for job in added:
        store.unreserve(job)
    assert store.reserve() == added[1]


def test_a_released_job_was_not_tried(store: JobStore) -> None:
    first, _ = add(store, 1), add(store, 2)
    for _ in range(5):
        job = claim(store)
        assert (job.id, job.attempts) == (first.id, 1)
        assert store.release(job)


def test_what_belongs_to_no_job_is_swept(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    known, lost = f"video_{1:032x}", f"video_{2:032x}"
    for id in (known, lost):
        folder.result(id, "video").write_bytes(b"x")
    folder.result(known, "video").with_name(f".{known}.mp4.123").write_bytes(b"half")
    folder.sweep({known}, set())
    assert [path.name for path in (tmp_path / "videos").iterdir()] == [f"{known}.mp4"]


def test_a_database_of_another_version(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as database:
        database.execute("PRAGMA user_version = 9")
    with pytest.raises(InvalidRequest, match=r"data: expected jobs of schema version 2 in .*, got 9: choose"):
        JobStore(tmp_path / "jobs.sqlite3", 1)
    (tmp_path / "text").write_text("no database " * 100)
    with pytest.raises(InvalidRequest, match=r"data: expected a database of jobs in .*text, got "):
        JobStore(tmp_path / "text", 1)
