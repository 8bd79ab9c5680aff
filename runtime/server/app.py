"""The routes of a service, as an ASGI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from .body import read_body
from .content import content_response
from .data_folder import Variant
from .events import events, wait_for_end
from .gate import Gate
from .job import WAITING, Job
from .operator_routes import add_operator_routes
from .page_routes import add_page
from .refusal import Refusal
from .service import Service

_log = logging.getLogger(__name__)
_HOUSEKEEPING_S = 60.0
# The status of POST /v1/videos/sync for a job's error; others are the server's own.
_STATUS = {"invalid_request": 400, "cancelled": 409, "out_of_memory": 503, "disk_full": 507}


def create_app(service: Service, *, numbered: bool = False) -> FastAPI:
    """The application of a service that its caller starts and stops; `numbered` is that of `Gate`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        housekeeping = asyncio.create_task(_expire(service))
        try:
            yield
        finally:
            housekeeping.cancel()

    # Its pages of documentation would load scripts from another host.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    settings = service.settings
    app.add_middleware(
        Gate,
        keys=settings.api_key,
        max_upload_bytes=settings.max_upload_bytes,
        metrics=service.metrics,
        numbered=numbered,
    )
    for kind, answer in ((Refusal, _refuse), (RequestValidationError, _invalid), (HTTPException, _unknown)):
        app.add_exception_handler(kind, answer)
    _add_making(app, service)
    _add_reading(app, service)
    _add_ending(app, service)
    add_operator_routes(app, service)
    add_page(app)
    return app


def _add_making(app: FastAPI, service: Service) -> None:
    """Routes that begin a video."""

    async def create(request: Request) -> Job:
        video, picture = await read_body(request, service.settings.max_upload_bytes)
        return await run_in_threadpool(service.create, video, picture)

    @app.post("/v1/videos")
    async def create_video(request: Request) -> Response:
        job = await create(request)
        return JSONResponse(service.json(job))

    @app.post("/v1/videos/sync")
    async def make_video(request: Request) -> Response:
        job = await wait_for_end(service, (await create(request)).id, request)
        if job is None:
            return Response(status_code=499)  # Nobody reads it.
        if job.error_code is not None:
            status = _STATUS.get(job.error_code, 500)
            raise Refusal(status, job.error_message or "", code=job.error_code)
        answer = _content(service, job, "video", request)
        answer.headers["x-video-id"] = job.id
        return answer


def _add_reading(app: FastAPI, service: Service) -> None:
    """Routes that change nothing."""

    @app.get("/v1/videos")
    def list_videos(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        page = service.page(after, limit, newest_first=order == "desc")
        ids = [job.id for job in page.jobs]
        return JSONResponse({
            "object": "list",
            "data": [service.json(job) for job in page.jobs],
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
            "has_more": page.has_more,
        })  # fmt: skip

    @app.get("/v1/videos/{id}")
    def retrieve_video(id: str) -> Response:
        job = service.get(id)
        answer = JSONResponse(service.json(job))
        if job.status in WAITING:
            answer.headers["openai-poll-after-ms"] = str(service.metrics.poll_after_ms)
        return answer

    @app.api_route("/v1/videos/{id}/content", methods=["GET", "HEAD"])
    def download_content(id: str, request: Request, variant: Variant = "video") -> Response:
        return _content(service, service.get(id), variant, request)

    @app.get("/v1/videos/{id}/events")
    def watch_video(id: str) -> Response:
        service.get(id)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(events(service, id), headers=headers, media_type="text/event-stream")


def _add_ending(app: FastAPI, service: Service) -> None:
    """Routes that end a video."""

    @app.post("/v1/videos/{id}/cancel")
    def cancel_video(id: str) -> Response:
        return JSONResponse(service.json(service.cancel(id)))

    @app.delete("/v1/videos/{id}")
    def delete_video(id: str) -> Response:
        service.delete(id)
        return JSONResponse({"id": id, "object": "video.deleted", "deleted": True})


def _content(service: Service, job: Job, variant: Variant, request: Request) -> Response:
    """Raises Refusal for a job that has no video, or not yet."""
    if job.status in WAITING:
        raise Refusal(
            409,
            f"The video is {job.status.replace('_', ' ')}: ask for it when its status is completed.",
            code="video_not_ready",
            headers={"Retry-After": "1"},
        )
    if job.result is None:
        raise Refusal(404, f"The video has failed: {job.error_message}", code="video_failed", param="id")
    etag = f'"{job.result.sha256[:32]}-{variant}"'
    return content_response(service.folder.result(job.id, variant), variant, etag, request.headers)


async def _expire(service: Service) -> None:
    while True:
        await asyncio.sleep(min(_HOUSEKEEPING_S, service.settings.expire_s))
        try:
            await run_in_threadpool(service.expire)
        except Exception:  # Such as a full disk; the next time may succeed.
            _log.exception("results that have expired")


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error.body, error.status, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    """A parameter of the address."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name, said = str(first["loc"][-1]), str(first["msg"]).removeprefix("Input should be ")
    message = f"{name}: expected {said}, got {str(first['input'])[:80]!r}: correct it"
    return JSONResponse(Refusal(400, message, code="invalid_value", param=name).body, 400)


async def _unknown(request: Request, error: Exception) -> Response:
    """An address or a method that there is not."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = f"{error.detail}: {request.method} {request.url.path[:80]}"
    headers = dict(error.headers or {})
    return JSONResponse(Refusal(error.status_code, message, code=code).body, error.status_code, headers)
