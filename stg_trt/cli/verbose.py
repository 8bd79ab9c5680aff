"""`--verbose`, an option of every command: shows the library's log, which is silent by default."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show what is built, captured, reused, chosen and left out.")
]


def with_verbose(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one more option; itself if it has that already."""
    given = inspect.signature(command).parameters
    if "verbose" in given:
        return command

    @functools.wraps(command)
    def wrapped(*arguments: Any, verbose: bool = False, **options: Any) -> None:
        if verbose:
            show_log()
        command(*arguments, **options)

    # typer reads both, and would look for the names in them here.
    hints = get_type_hints(command, include_extras=True)
    option = inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Verbose)
    parameters = [
        *(parameter.replace(annotation=hints[parameter.name]) for parameter in given.values()),
        option,
    ]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {**hints, "verbose": Verbose}
    return wrapped


class _ToStderr(logging.Handler):
    """Looks stderr up for each line: a progress bar puts a stream of its own there while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def show_log() -> None:
    """Writes what `stg_trt` logs to stderr."""
    handler = _ToStderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    log = logging.getLogger("stg_trt")
    log.handlers = [handler]
    log.setLevel(logging.INFO)
