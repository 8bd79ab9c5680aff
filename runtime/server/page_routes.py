"""The page for people: three files that use the API, and nothing from another host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

_FOLDER = Path(__file__).parent / "page"
_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
PAGE_PATHS = tuple(_FILES)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data: blob:; "
    "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_page(app: FastAPI) -> None:
    """The page and what it is made of; nobody needs a key to see it."""
    for path, name in _FILES.items():
        app.add_api_route(path, _answer(_FOLDER / name), methods=["GET"], response_class=FileResponse)


def _answer(file: Path) -> Callable[[], FileResponse]:
    headers = {
        "content-security-policy": _POLICY,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
    }

    def answer() -> FileResponse:
        return FileResponse(file, headers=headers)

    return answer
