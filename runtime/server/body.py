"""The body of a request for a video: a multipart or urlencoded form, or JSON."""

from __future__ import annotations

import asyncio
import json

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from .reference import FIELD, bytes_of_text, decode_picture
from .refusal import Refusal, invalid
from .video_request import VideoRequest, fields_of_form, read_fields

# A client that sends its body a byte at a time holds a connection no longer than that.
_BODY_S = 120
_MAX_FIELDS = 200


async def read_body(request: Request, max_upload_bytes: int) -> tuple[VideoRequest, Image.Image | None]:
    """The fields and the picture; raises Refusal for what cannot be used."""
    try:
        async with asyncio.timeout(_BODY_S):
            if request.headers.get("content-type", "").partition(";")[0].strip() == "application/json":
                fields = await _json_fields(request)
                upload = None
            else:
                fields, upload = await _form_fields(request, max_upload_bytes)
    except TimeoutError as error:
        message = f"body: expected all of it within {_BODY_S} s, got a part: send it faster"
        raise Refusal(408, message, code="request_timeout") from error
    given = fields.pop(FIELD, None)
    if upload is not None and given is not None:
        raise invalid(FIELD, "expected it once, got it twice: leave one out")
    if given is not None:
        upload = bytes_of_text(_text_of_reference(given))
    if upload is not None and len(upload) > max_upload_bytes:
        raise Refusal(
            413,
            f"{FIELD}: expected at most {max_upload_bytes} bytes, got {len(upload)}: send a smaller picture",
            code="request_too_large",
            param=FIELD,
        )
    video = read_fields(fields)
    return video, None if upload is None else await run_in_threadpool(decode_picture, upload)


def _text_of_reference(given: object) -> str:
    """A text, or what stands for it in OpenAI's objects: {"image_url": text}."""
    if isinstance(given, dict):
        if given.keys() != {"image_url"}:
            raise invalid(FIELD, f"expected image_url alone, got {', '.join(map(str, given))[:80]}: send it")
        given = given["image_url"]
    if not isinstance(given, str):
        raise invalid(FIELD, f"expected a file or a data: URL, got {type(given).__name__}: send one")
    return given


async def _json_fields(request: Request) -> dict[str, object]:
    try:
        fields = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"body: expected JSON, got {error}: correct it", code="invalid_json") from error
    if not isinstance(fields, dict):
        got = type(fields).__name__
        raise Refusal(400, f"body: expected a JSON object, got {got}: correct it", code="invalid_json")
    return fields


async def _form_fields(request: Request, max_upload_bytes: int) -> tuple[dict[str, object], bytes | None]:
    """The texts of a form, and the bytes of its file."""
    try:
        async with request.form(
            max_files=1, max_fields=_MAX_FIELDS, max_part_size=max_upload_bytes * 4 // 3 + 100
        ) as form:
            texts = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
            files = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
            for name, _ in files:
                if name != FIELD:
                    raise invalid(name[:80], f"expected no file but {FIELD}, got one: leave it out")
            return fields_of_form(texts), await files[0][1].read() if files else None
    except HTTPException as error:
        message = f"body: expected a multipart form or JSON, got one that cannot be read ({error.detail})"
        raise Refusal(400, f"{message}: correct it", code="invalid_form") from error
