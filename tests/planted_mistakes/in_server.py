"""In runtime/server/."""

from __future__ import annotations

from tests.planted_mistakes.mistake import Mistake

_STORE = "tests/server/test_job_store.py"
_JOBS = "tests/server/test_jobs.py"
_CONTENT = "tests/server/test_content.py"
_REQUESTS = "tests/server/test_requests.py"
_REPLICA = "tests/server/test_replica.py"
_CLIENT = "tests/server/test_openai_client.py"

IN_SERVER = (
    Mistake(
        "any web page may make videos",
        "runtime/server/gate.py",
        "            _check_origin(headers)\n",
        "",
        (f"{_JOBS}::test_pages_of_other_servers",),
    ),
    Mistake(
        "a worker writes for a job that another has claimed",
        "runtime/server/job_store.py",
        "WHERE id = ? AND fence = ? AND status",
        "WHERE id = ? AND fence >= ? AND status",
        (f"{_STORE}::test_a_claim_that_was_overtaken_writes_nothing",),
    ),
    Mistake(
        "a job that kills the server is tried for ever",
        "runtime/server/job_store.py",
        "AND attempts >= ?",
        "AND attempts > ?",
        (f"{_STORE}::test_a_job_is_interrupted_twice_at_most",),
    ),
    Mistake(
        "a job that a drain gives back has lost an attempt",
        "runtime/server/job_store.py",
        "status = 'queued', attempts = attempts - 1",
        "status = 'queued'",
        (f"{_STORE}::test_a_released_job_was_not_tried",),
    ),
    Mistake(
        "half-written videos stay on the disk",
        "runtime/server/data_folder.py",
        "if path.stem not in known:",
        "if path.stem in known:",
        (f"{_STORE}::test_what_belongs_to_no_job_is_swept",),
    ),
    Mistake(
        "a cancelled run goes on to its end",
        "runtime/server/worker.py",
        "step.seconds)\n        self.check()\n",
        "step.seconds)\n",
        (f"{_JOBS}::test_the_step_after_a_cancel_is_the_last",),
    ),
    Mistake(
        "any key is let in",
        "runtime/server/gate.py",
        "or not any(known)",
        "or not known",
        (f"{_JOBS}::test_keys",),
    ),
    Mistake(
        "a body without a length has no end",
        "runtime/server/gate.py",
        'received += len(message.get("body", b""))',
        "received += 0",
        (f"{_REQUESTS}::test_bodies_are_bounded",),
    ),
    Mistake(
        "a range has a byte too few",
        "runtime/server/content.py",
        "min(int(last) + 1 if last",
        "min(int(last) if last",
        (f"{_CONTENT}::test_a_range",),
    ),
    Mistake(
        "the seed is not the request's",
        "runtime/server/served_model.py",
        "manual_seed(request.seed)",
        "manual_seed(request.seed + 1)",
        (f"{_CLIENT}::test_a_video_is_that_of_the_command_line",),
    ),
    Mistake(
        "the picture is not looked at",
        "runtime/server/served_model.py",
        "            image=picture,\n",
        "            image=None,\n",
        (f"{_REQUESTS}::test_a_picture_is_the_same_however_it_is_sent",),
    ),
    Mistake(
        "pictures of any size are decoded",
        "runtime/server/reference.py",
        "_MAX_PIXELS = 64_000_000",
        "_MAX_PIXELS = 64_000_000_000",
        (f"{_REQUESTS}::test_pictures_that_are_none",),
    ),
    Mistake(
        "results are kept for ever",
        "runtime/server/service.py",
        "        for id in self._store.delete_expired():\n            self.folder.remove(id)\n",
        "        pass\n",
        (f"{_JOBS}::test_quota_and_expiry",),
    ),
    Mistake(
        "two workers take the same job",
        "runtime/server/job_store.py",
        'if row["id"] not in self._reserved',
        "if row",
        (f"{_STORE}::test_a_reserved_job_is_one_workers",),
    ),
    Mistake(
        "a replica makes a cancelled video to its end",
        "runtime/server/replica.py",
        "            stopped.set()\n",
        "",
        (f"{_REPLICA}::test_a_replica_ends_a_cancelled_video_within_a_step",),
    ),
    Mistake(
        "a replica that has lost its GPU begins the next video",
        "runtime/server/replica.py",
        "        self.check_health()\n        loop, stopped",
        "        loop, stopped",
        (f"{_REPLICA}::test_a_replica_without_its_gpu_is_replaced",),
    ),
    Mistake(
        "a job has lost an attempt by waiting for a replica",
        "runtime/server/replica_maker.py",
        "        picture = self._folder.load_reference",
        "        run.begin()\n        picture = self._folder.load_reference",
        (f"{_REPLICA}::test_a_job_begins_with_its_replica",),
    ),
)
