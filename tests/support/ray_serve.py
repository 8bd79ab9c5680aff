"""An application of Ray Serve in processes of its own, all of which end with its tests."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

from stg_trt.runtime.server.served_model import ModelSource
from tests.support.cli import ROOT
from tests.support.running_server import wait_for

# Inherited by every process that Ray starts, some of which outlive their parents.
_MARK = "STG_TRT_RAY_TEST"
# Half a minute on two cores that have nothing else to do.
_START_S = 300
# `serve run` in a small cluster, which by itself would have a dashboard and a third of the memory.
_RUN = """
import signal, sys
import ray
from ray.serve.scripts import cli

# A shell's background jobs, and their children, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
ray.init(namespace="serve", include_dashboard=False, num_cpus=3, num_gpus=0, object_store_memory=100 << 20,
         _temp_dir=sys.argv[1])
cli(["run", sys.argv[2]])
"""


@dataclass(frozen=True)
class RayServe:
    """`serve run`, a client of its HTTP API, and the processes that it has started."""

    process: subprocess.Popen[bytes]
    http: httpx2.Client
    mark: str
    log: Path

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Those with a word in their title, such as the class of a replica."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get(_MARK) == self.mark
                if ours and name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # It has ended, or is another user's.
                continue
        return found

    def kill(self) -> None:
        """Every process, until there is none."""
        while left := self.processes():
            for process in left:
                process.kill()
            psutil.wait_procs(left, timeout=10)
        self.process.wait()


@contextmanager
def ray_serve(source: ModelSource, data: Path, **arguments: float) -> Iterator[RayServe]:
    """Ready, with `min_replicas` that are warm."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = {
        "checkpoints": source.checkpoint,
        "engines": str(source.engines[0]),
        "data": str(data),
        "model_name": "tiny",
        "gpus_per_replica": 0,
        **arguments,
    }
    application = {
        "name": "videos",
        "import_path": "stg_trt.runtime.server.ray_application:application",
        "args": given,
    }
    config = data.parent / "config.yaml"
    # JSON is YAML.
    config.write_text(
        json.dumps({
            "http_options": {"host": "127.0.0.1", "port": port},
            "logging_config": {"enable_access_log": False},
            "applications": [application],
        })
    )  # fmt: skip
    # A socket's path has at most 107 characters.
    scratch, log, mark = tempfile.mkdtemp(prefix="ray"), data.parent / "log", secrets.token_hex(8)
    # Ray's own ports are open to all networks; with a token of its own, nobody else can use them.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    # Replicas that are killed leave their own temporary folders behind.
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "TMPDIR": scratch, _MARK: mark}
    environment = {**os.environ, **token, **settings}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN, scratch, config],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        serve = RayServe(process, http, mark, log)
        try:
            wait_for(lambda: _is_ready(serve), _START_S)
            wait_for(lambda: len(serve.processes("VideoReplica")) == arguments["min_replicas"], _START_S)
            yield serve
        finally:
            serve.kill()
            shutil.rmtree(scratch)


def _is_ready(serve: RayServe) -> bool:
    assert serve.process.poll() is None, serve.log.read_text()
    try:
        return serve.http.get("/health/ready").status_code == 200
    except httpx2.TransportError:
        return False


def interrupt(serve: RayServe) -> int:
    """Ctrl-C; returns the exit status."""
    serve.process.send_signal(signal.SIGINT)
    return serve.process.wait(60)
