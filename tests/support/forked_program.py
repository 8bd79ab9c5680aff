"""`stg-trt` as a process that takes no seconds to start: see program_server.py."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from select import select
from typing import IO

from tests.support.cli import ROOT


class ForkedProgram:
    """A running program, child of another process; with the names of `subprocess.Popen`."""

    def __init__(self, answers: int) -> None:
        self.returncode: int | None = None
        self.cpu_s = 0.0
        """Of the whole run, once it has ended."""
        self._answers = os.fdopen(answers, "rb", buffering=0)
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The status; raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("stg-trt", timeout)
            self.returncode, self.cpu_s = json.loads(self._answers.readline())
            self._answers.close()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class ProgramServer:
    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests

    def start(self, *arguments: str | Path, output: IO[str] | int, program: str = "stg-trt") -> ForkedProgram:
        """A program in ROOT; its stdout and stderr go to a file or terminal."""
        ours, theirs = os.pipe()
        command = json.dumps([program, *map(str, arguments)]).encode()
        descriptor = output if isinstance(output, int) else output.fileno()
        socket.send_fds(self._requests, [command], [descriptor, theirs])
        os.close(theirs)
        return ForkedProgram(ours)


@contextmanager
def program_server(log: Path, *build: str | Path) -> Iterator[ProgramServer]:
    """Its programs have the graphs of a build, of which the checkpoint and options are given."""
    command = [sys.executable, "-m", "tests.support.program_server", *map(str, build)]
    # Whole messages: one is one request.
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, log.open("w") as output:
        server = subprocess.Popen(command, cwd=ROOT, stdin=theirs.fileno(), stdout=output, stderr=output)
        theirs.close()
        yield ProgramServer(ours)
        ours.close()
        assert server.wait(60) == 0, log.read_text()
