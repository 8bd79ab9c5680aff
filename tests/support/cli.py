"""The command line: called in this process, which is quick, or started as users start it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO, Any
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file

from stg_trt.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(sys.executable).with_name("stg-trt")
# A build's report if stderr is no terminal: its name and segments, then a line per segment.
PROGRESS = re.compile(
    r"(segmented|twin)-\S+: (\w+(, \w+)*|another build is at work .*)"
    r"|\w+: (done, .* s(, graph of an earlier build)?|already built)"
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Of the goldens, so that builds find their graphs exported.
SIZES = ("--height=128", "--width=160", "--num-frames=17", "--text-length=9")
SMALL = (*SIZES, "--stg-blocks=")


def invoke(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """`stg-trt` with arguments, through its entry point, in this process and in ROOT."""
    with chdir(ROOT):
        return answer_of(main, *args)


def answer_of(program: Callable[[], None], *args: str | Path) -> subprocess.CompletedProcess[str]:
    """The exit status and output of an entry point, including compiled code's output and warnings."""
    command = ["stg-trt", *map(str, args)]
    handlers, status = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}, 0
    with ExitStack() as stack:
        stdout, stderr = (stack.enter_context(tempfile.TemporaryFile("a+")) for _ in range(2))
        stack.enter_context(written_to(1, stdout))
        stack.enter_context(written_to(2, stderr))
        stack.enter_context(redirect_stdout(stdout))
        stack.enter_context(redirect_stderr(stderr))
        stack.enter_context(warnings_shown())
        stack.enter_context(mock.patch.object(sys, "argv", command))
        # typer would show the package's name for a package that runs as a program.
        stack.enter_context(mock.patch.object(sys.modules["__main__"], "__package__", None))
        try:
            program()
        except SystemExit as ended:
            assert isinstance(ended.code, int)
            status = ended.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        printed = [read_again(file) for file in (stdout, stderr)]
    return subprocess.CompletedProcess(command, status, *printed)


@contextmanager
def written_to(descriptor: int, file: IO[str]) -> Iterator[None]:
    """Sends the output to the file, also that of compiled code."""
    kept = os.dup(descriptor)
    os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


@contextmanager
def warnings_shown() -> Iterator[None]:
    """A user's warnings are printed, as in a process of its own; pytest would keep them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, category, *place: print(message, file=sys.stderr)
        yield


def read_again(file: IO[str]) -> str:
    file.flush()
    file.seek(0)
    return file.read()


def run(*args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`stg-trt` with arguments, to its end, in a process of its own."""
    settings = {"capture_output": True, "text": True, "timeout": 180, "cwd": ROOT, **options}
    return subprocess.run([PROGRAM, *map(str, args)], **settings)


def start(*args: str | Path, **options: Any) -> subprocess.Popen[str]:
    """`stg-trt` with arguments, running."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, **options}
    return subprocess.Popen([PROGRAM, *map(str, args)], **settings)


def finish(process: subprocess.Popen[str], timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Waits for a started command."""
    stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def cpu_seconds_of_ended_children() -> float:
    """Of this process, so far; other programs on the machine do not stretch it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def some_started(cases: Iterable[str], started: Collection[str]) -> list[object]:
    """Names of cases, as parameters; those that start the program are slow."""
    slow = pytest.mark.slow(reason="starts the program")
    return [pytest.param(case, marks=slow if case in started else ()) for case in cases]


def assert_one_line_error(result: subprocess.CompletedProcess[str], pattern: str) -> None:
    """Exit code 1, and beside progress one line: `stg-trt: ` and what `pattern` finds."""
    assert result.returncode == 1, result.stderr
    assert not result.stdout, result.stdout
    lines = result.stderr.splitlines()
    errors = [line for line in lines if not PROGRESS.fullmatch(line)]
    assert len(errors) == 1 and errors == lines[-1:], result.stderr
    assert errors[0].startswith("stg-trt: ") and re.search(pattern, errors[0]), errors[0]


def keep_one_block(checkpoint: Path) -> None:
    """Drops every block but the first, so that a build takes a few seconds."""
    config = checkpoint / "transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 1}))
    weights = checkpoint / "transformer" / WEIGHTS
    tensors = load_file(weights)
    kept = {name: t for name, t in tensors.items() if not re.match(r"transformer_blocks\.[1-9]", name)}
    save_file(kept, weights)


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, locks aside."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
