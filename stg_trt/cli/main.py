"""The `stg-trt` command: the programs' commands under one name, and one line for every error."""

from __future__ import annotations

import atexit
import errno
import gc
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from stg_trt.errors import StgTrtError, is_out_of_memory

if TYPE_CHECKING:
    import typer

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# typer answers Ctrl-C with this status instead of the exception.
_INTERRUPTED = 130


def main() -> None:
    """Entry point of the console script."""
    _run(_application)


def run_command(command: Callable[..., None]) -> None:
    """Runs one command as a program of its own."""

    def application() -> typer.Typer:
        return _new_app(command)

    _run(application)


def run_group(group: typer.Typer) -> None:
    """Runs a group of commands as a program of its own."""
    _run(lambda: _verbose_group(group))


def _application() -> typer.Typer:
    # The programs import the library; here, and only here, the library's command line gathers them.
    from stg_trt.benchmarks.command import bench
    from stg_trt.build_engines.command import build
    from stg_trt.build_engines.verify_command import verify
    from stg_trt.cli.doctor import doctor
    from stg_trt.cli.inspect import inspect
    from stg_trt.runtime.command import generate
    from stg_trt.runtime.server.command import serve

    app = _new_app(
        build, generate, serve, inspect, verify, doctor,
        help="Video diffusion with Spatiotemporal Skip Guidance on compiled engines.",
    )  # fmt: skip
    app.add_typer(_verbose_group(bench), name="bench")
    return app


def _new_app(*commands: Callable[..., None], **options: Any) -> typer.Typer:
    import typer

    from stg_trt.cli.verbose import with_verbose

    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, **options)
    for command in commands:
        app.command()(with_verbose(command))
    return app


def _verbose_group(group: typer.Typer) -> typer.Typer:
    from stg_trt.cli.verbose import with_verbose

    for command in group.registered_commands:
        assert command.callback is not None
        command.callback = with_verbose(command.callback)
    return group


def _run(application: Callable[[], typer.Typer]) -> None:
    # Python collects garbage once more at exit, which takes two seconds after an export.
    atexit.register(gc.freeze)
    interrupts = _record_interrupts()
    # Imported late: until here, an interrupt would show a traceback.
    import typer

    try:
        status = application()(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    except Exception as error:
        # Compiled libraries turn an interrupt that hits them into errors of their own.
        if not interrupts:
            message = _message(error)
            if message is None:
                raise
            _fail(message)
        status = _INTERRUPTED
    if status == _INTERRUPTED:
        # A second Ctrl-C must not print a traceback while the libraries shut down.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _fail("interrupted: nothing half-written is left, finished segments are kept")


def _record_interrupts() -> list[int]:
    """Ctrl-C still raises KeyboardInterrupt, and is recorded in the list."""
    interrupts: list[int] = []

    def record(signum: int, frame: FrameType | None) -> None:
        interrupts.append(signum)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, record)
    return interrupts


def _message(error: Exception) -> str | None:
    """The message for an error; None for a defect of this program."""
    if isinstance(error, StgTrtError):
        return str(error)
    if isinstance(error, _usage_error_class()):
        return _usage_error(error)
    if is_out_of_memory(error):
        return _memory_error(error)
    return _os_error(error) if isinstance(error, OSError) else None


def _usage_error_class() -> type[Exception]:
    """The base class of every mistake on the command line; typer exports its subclasses only."""
    import typer

    return typer.BadParameter.__bases__[0]


def _usage_error(error: Any) -> str:
    """The mistake that typer found, and where the right names are; empty if it has shown the help."""
    message = str(error.format_message()).rstrip(".")
    return f"{message}: see {error.ctx.command_path} --help" if message and error.ctx else message


def _memory_error(error: Exception) -> str:
    """The allocation that failed, if the library says it, and ways to need less."""
    detail = (str(error).splitlines() or [""])[0]
    return (
        f"out of memory: expected more free memory, got {detail or type(error).__name__}: use fewer frames, "
        "a smaller size, fewer videos at once or the segmented layout, which holds the weights once"
    )


def _os_error(error: OSError) -> str:
    where = error.filename or "output"
    if error.errno in _NO_SPACE:
        return f"{where}: expected free disk space, got none left: free some or choose another --output"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}: expected a place that can be written, got {error.strerror}: choose another --output"
    return f"{where}: expected a path that can be used, got {error.strerror or error}: check it"


def _fail(message: str) -> None:
    if message:
        print(f"stg-trt: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)
