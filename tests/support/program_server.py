"""Runs `stg-trt` in forks of a process that has its imports and most graphs of a build.

Both take seconds in each process. A fork is a process of its own for all else: signals, locks, files, memory.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path

from stg_trt.cli.main import main as stg_trt
from tests.support.endless_graph import stg_trt_with_an_endless_gate
from tests.support.shared_graphs import FOLDER, share_graphs

PROGRAMS = {"stg-trt": stg_trt, "endless gate": stg_trt_with_an_endless_gate}


def run(program: str, *arguments: str) -> None:
    sys.argv = ["stg-trt", *arguments]
    PROGRAMS[program]()


def run_to_the_end(program: str, *arguments: str) -> None:
    """Ends this process, without what compiled libraries do then: they wait for threads that no fork has."""
    status: object = 0
    try:
        run(program, *arguments)
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    assert status is None or isinstance(status, int)
    os._exit(status or 0)


def prepare(checkpoint: str, *options: str) -> None:
    """After it every fork has the graphs of this build's pieces."""
    importlib.import_module("stg_trt.runtime.pipeline")
    share_graphs(Path(os.environ[FOLDER]))
    with tempfile.TemporaryDirectory() as folder:
        run("stg-trt", "build", checkpoint, "--output", folder, *options)


def serve(requests: socket.socket) -> list[str]:
    """Returns in each fork, with its program and arguments; ends with the process that asks.

    With a request come the descriptors of the program's output, and of a pipe for the answers.
    """
    while True:
        data, descriptors, *_ = socket.recv_fds(requests, 1 << 16, 2)
        if not data:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            return in_a_watched_fork(json.loads(data), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def in_a_watched_fork(command: list[str], output: int, answers: int) -> list[str]:
    """Returns in a fork of this process, which answers with its id and, later, its status and CPU seconds."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if program := os.fork():
        os.write(answers, f"{program}\n".encode())
        _, status, usage = os.wait4(program, 0)
        ended = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        os.write(answers, f"{json.dumps(ended)}\n".encode())
        os._exit(0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.close(answers)
    return command


if __name__ == "__main__":
    prepare(*sys.argv[1:])
    # Nobody waits for the forks that watch.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    run_to_the_end(*serve(socket.socket(fileno=0)))
