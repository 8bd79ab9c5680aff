"""The refusals of the API, in the form of OpenAI's errors."""

from __future__ import annotations

import re
from collections.abc import Mapping

from stg_trt.errors import StgTrtError

# Arguments of the pipeline that have other names in the API.
_API_NAMES = {"image": "input_reference", "frame_rate": "fps"}
_PARAM = re.compile(r"([a-z_]\w*): ")


class Refusal(Exception):
    """An answer other than the one that was asked for: its status, and what the body says.

    `param` is the field that is to blame, if one is; `code` is for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        param = None if self.param is None else _encodable(self.param)
        error = {"message": _encodable(self.message), "type": kind, "param": param, "code": self.code}
        return {"error": error}


def _encodable(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def invalid(param: str, message: str, code: str = "invalid_value") -> Refusal:
    """A field that cannot be used; the message begins with its name."""
    param = param[:80]
    return Refusal(400, f"{param}: {message}", code=code, param=param)


def from_library(error: StgTrtError) -> Refusal:
    """The refusal of a request that the pipeline does not take; its messages begin with the argument."""
    message = str(error)
    for name, known in _API_NAMES.items():
        if message.startswith(f"{name}: "):
            message = known + message[len(name) :]
    named = _PARAM.match(message)
    return Refusal(400, message, code="invalid_value", param=named[1] if named else None)
