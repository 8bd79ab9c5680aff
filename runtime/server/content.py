"""The bytes of a result, whole or a range of them, as a player asks for them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse

from .data_folder import SUFFIXES, Variant
from .refusal import Refusal

_TYPES: dict[Variant, str] = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_CHUNK_BYTES = 1 << 18


def content_response(path: Path, variant: Variant, etag: str, asked: Headers) -> Response:
    """A finished job's file; raises Refusal 404 if it has gone meanwhile, and 416 for a range beyond its end.

    Several ranges, and other units than bytes, are answered with the whole file, as RFC 9110 allows.
    """
    headers = {
        "etag": etag,
        "accept-ranges": "bytes",
        "cache-control": "private",
        "content-disposition": f'inline; filename="{path.stem}{SUFFIXES[variant]}"',
    }
    if etag in [one.strip().removeprefix("W/") for one in asked.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise Refusal(404, "The video has been deleted.", code="not_found", param="id") from error
    size = path.stat().st_size
    whole = asked.get("if-range", etag) != etag
    try:
        span = None if whole else _span(asked.get("range", ""), size)
    except Refusal:
        file.close()
        raise
    start, stop = span or (0, size)
    headers["content-length"] = str(stop - start)
    if span is not None:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    status = 200 if span is None else 206
    return StreamingResponse(_chunks(file, start, stop), status, headers, _TYPES[variant])


def _span(text: str, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last; None for the whole file."""
    found = _RANGE.fullmatch(text.strip())
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if first == "":
        start, stop = max(size - int(last), 0), size
        beyond = int(last) == 0
    else:
        start, stop = int(first), min(int(last) + 1 if last else size, size)
        if last and int(last) < int(first):
            return None
        beyond = start >= size
    if beyond:
        raise Refusal(
            416,
            f"Range: expected bytes below {size}, got {text[:80]}: ask for less",
            code="range_not_satisfiable",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, stop


def _chunks(file: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        while start < stop:
            chunk = file.read(min(_CHUNK_BYTES, stop - start))
            if not chunk:
                return
            start += len(chunk)
            yield chunk
