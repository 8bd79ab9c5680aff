"""Waiting for a job in the event loop: its steps as server-sent events, and its end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from .job import WAITING, Job
from .refusal import Refusal
from .service import Service

_KEEP_ALIVE_S = 15.0
_LOOK_S = 1.0


async def events(service: Service, id: str) -> AsyncIterator[str]:
    """Every step that the job has taken and takes, then its end: completed, failed or deleted."""
    sent = 0
    with service.board.watch() as changed:
        while True:
            changed.clear()
            try:
                job = await run_in_threadpool(service.get, id)
            except Refusal:
                yield _event("deleted", {"id": id})
                return
            steps = service.board.steps(id)
            for step in steps[sent:]:
                yield _event("step", step.json)
            sent = len(steps)
            if job.status not in WAITING:
                yield _event(job.status, service.json(job))
                return
            if service.closed:
                return
            if not await _woken(changed, _KEEP_ALIVE_S):
                yield ": the job goes on\n\n"


async def wait_for_end(service: Service, id: str, request: Request) -> Job | None:
    """The job once it has ended; None if the client has gone, whose job is cancelled then.

    Raises Refusal if the job is deleted, or the server ends first.
    """
    try:
        return await _end(service, id, request)
    except asyncio.CancelledError:
        # Ray Serve ends the task of a client that has gone; a server that ends does so with all tasks.
        if not service.draining:
            service.cancel(id)
        raise


async def _end(service: Service, id: str, request: Request) -> Job | None:
    with service.board.watch() as changed:
        while True:
            changed.clear()
            job = await run_in_threadpool(service.get, id)
            if job.status not in WAITING:
                return job
            if service.closed:
                raise Refusal(
                    503,
                    f"The server is shutting down: {id} is made after its next start.",
                    code="shutting_down",
                )
            if await request.is_disconnected():
                await run_in_threadpool(service.cancel, id)
                return None
            await _woken(changed, _LOOK_S)


async def _woken(changed: asyncio.Event, timeout_s: float) -> bool:
    try:
        await asyncio.wait_for(changed.wait(), timeout_s)
    except TimeoutError:
        return False
    return True


def _event(name: str, data: Mapping[str, object]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
