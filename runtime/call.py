"""The arguments of a call, read once for every method that takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from .arguments import ForeignArguments
from .callbacks import StepCallback, VideoCallback
from .schedule import Request

_Self = TypeVar("_Self")
_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


@dataclass(frozen=True)
class Call:
    """What is asked of a pipeline, up to what it does with the latents."""

    request: Request
    output_type: str
    callback: StepCallback | None
    on_video: VideoCallback | None
    foreign: ForeignArguments


def with_arguments_of(
    read: Callable[Concatenate[_Self, _Arguments], Call],
) -> Callable[[Callable[[_Self, Call], _Result]], Callable[Concatenate[_Self, _Arguments], _Result]]:
    """Gives a method that takes a Call the arguments of the one that reads it."""

    def decorate(
        method: Callable[[_Self, Call], _Result],
    ) -> Callable[Concatenate[_Self, _Arguments], _Result]:
        @wraps(method)
        def call(self: _Self, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            return method(self, read(self, *args, **kwargs))

        result: Any = call
        answer = inspect.signature(method).return_annotation
        result.__signature__ = inspect.signature(read).replace(return_annotation=answer)
        return call

    return decorate
