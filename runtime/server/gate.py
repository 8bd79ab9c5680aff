"""Middleware of every request: gives it an id, checks its key, bounds its body, counts its answer."""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .page_routes import PAGE_PATHS
from .refusal import Refusal

_log = logging.getLogger(__name__)
# A load balancer has no key; the page asks for one.
_OPEN = ("/health/live", "/health/ready", *PAGE_PATHS)
# Multipart boundaries, names of fields and texts beside a picture.
_BESIDE_UPLOAD_BYTES = 1 << 20


class Gate:
    """ASGI middleware; the only place where an unforeseen error becomes an answer.

    `numbered` says that a proxy before it has given each request an id, and adds it to the answer.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str], max_upload_bytes: int, metrics: Metrics, numbered: bool
    ) -> None:
        self._app = app
        self._keys = [_digest(key.encode()) for key in keys]
        # Base64 in a JSON body is a third longer than the picture.
        self._max_body_bytes = max_upload_bytes * 4 // 3 + _BESIDE_UPLOAD_BYTES
        self._metrics = metrics
        self._numbered = numbered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; anything but HTTP is passed on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "") if self._numbered else ""
        request_id, status = given or f"req_{secrets.token_hex(16)}", 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                if not given:
                    headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            headers = Headers(scope=scope)
            _check_origin(headers)
            self._check_key(scope["path"], headers)
            self._check_length(headers.get("content-length"))
            await self._app(scope, self._bounded(receive), answer)
        except Refusal as refusal:
            if not status:
                await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, answer)
        except Exception:
            _log.exception("%s %s %s", request_id, scope["method"], scope["path"])
            if not status:
                await _internal_error(request_id)(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if route != "none" else "any"
            self._metrics.count_answer(method, route, status)

    def _check_key(self, path: str, headers: Headers) -> None:
        """Raises Refusal 401. All keys are compared, each in constant time: their hashes have one length."""
        if not self._keys or path in _OPEN:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Names and values of headers are bytes, of which Latin-1 keeps each.
        given = _digest(key.strip().encode("latin-1"))
        known = [hmac.compare_digest(given, one) for one in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            raise Refusal(
                401,
                "The API key is missing or wrong: send the header Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_length(self, length: str | None) -> None:
        if (
            length is not None
            and length.isascii()
            and length.isdigit()
            and int(length) > self._max_body_bytes
        ):
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        """A body may be longer than it says, or say nothing."""
        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large()
            return message

        return receive_bounded

    def _too_large(self) -> Refusal:
        return Refusal(
            413,
            f"body: expected at most {self._max_body_bytes} bytes, got more: send a smaller picture",
            code="request_too_large",
            headers={"Connection": "close"},
        )


def _check_origin(headers: Headers) -> None:
    """Raises Refusal 403 for a web page of another server, which a browser here would let make videos.

    Programs send no such header.
    """
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        raise Refusal(
            403,
            f"Origin: expected a page of this server, got {origin[:80]!r}: send requests from a program, or "
            "through a proxy on the page's own address",
            code="wrong_origin",
        )


def _internal_error(request_id: str) -> JSONResponse:
    message = f"The server made a mistake. Its log has the cause beside {request_id}."
    return JSONResponse(Refusal(500, message, code="internal_error").body, 500)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
