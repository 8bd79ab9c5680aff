"""A server under load: clients that ask for videos as fast as its queue takes them, on this machine alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from stg_trt.errors import GateMissed
from stg_trt.system.units import MIB

from .record import Record, percentiles

_QUEUE = 8
_POLL_S = 0.2
_SAMPLE_S = 1.0
# Of the memory after the first minutes; below it lie the allocator's habits.
_GROWTH = 1.05
_ENDED = ("completed", "failed")


@dataclass(frozen=True)
class Served:
    """A job from the client's side; seconds until it ran, and until it had ended."""

    status: str
    queued_s: float
    whole_s: float


class ServeBenchmark:
    """Runs `stg-trt serve` in a process of its own, and clients in threads of this one."""

    def __init__(
        self, checkpoint: str, engines: Path, prompt: str, steps: int, minutes: float, clients: int
    ) -> None:
        self._checkpoint = checkpoint
        self._engines = engines
        self._request = {"prompt": prompt, "num_inference_steps": steps}
        self._seconds = 60 * minutes
        self._clients = clients
        self._lock = threading.Lock()
        self._served: list[Served] = []
        self._refused = self._lost = 0

    def run(self, output: Path) -> None:
        """Writes the result; it is not trusted if a job was lost or failed, or if the memory grew."""
        asked = {"clients": self._clients, "max_queue": _QUEUE, "seconds": self._seconds, **self._request}
        record = Record(output, "serve", checkpoint=self._checkpoint, **asked)
        with tempfile.TemporaryDirectory() as data, self._server(Path(data)) as (process, url):
            end = time.monotonic() + self._seconds
            threads = [threading.Thread(target=self._ask, args=(url, end)) for _ in range(self._clients)]
            for thread in threads:
                thread.start()
            memory = self._watch(process, end)
            for thread in threads:
                thread.join()
        self._report(record, memory)
        record.finish()

    @contextmanager
    def _server(self, data: Path) -> Iterator[tuple[psutil.Process, str]]:
        """Once it is ready."""
        main = "from stg_trt.cli.main import main; main()"
        command = [sys.executable, "-c", main, "serve", self._checkpoint, "--engines", str(self._engines)]
        options = ["--data", str(data), "--port=0", f"--max-queue={_QUEUE}"]
        process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise GateMissed("serve: expected a server, got none: its reason is above")
            url = line.split()[-1]
            while _status(f"{url}/health/ready") != 200:
                time.sleep(_POLL_S)
            yield psutil.Process(process.pid), url
        finally:
            process.terminate()
            process.wait()

    def _ask(self, url: str, end: float) -> None:
        """One client: the next video as soon as it has the last one."""
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                id = _json(f"{url}/v1/videos", self._request)["id"]
            except urllib.error.HTTPError as error:
                assert error.code == 429, error.read()
                with self._lock:
                    self._refused += 1
                time.sleep(float(error.headers["Retry-After"]))
                continue
            served = self._follow(f"{url}/v1/videos/{id}", began)
            with self._lock:
                if served is None:
                    self._lost += 1
                else:
                    self._served.append(served)

    def _follow(self, url: str, began: float) -> Served | None:
        """The job at its end; None if the server no longer knows it, or its content is not there."""
        queued_s = None
        while True:
            try:
                status = _json(url)["status"]
                now = time.monotonic() - began
                if queued_s is None and status != "queued":
                    queued_s = now
                if status in _ENDED:
                    if status == "completed" and _status(f"{url}/content") != 200:
                        return None
                    return Served(status, queued_s or now, now)
            except urllib.error.HTTPError:
                return None
            time.sleep(_POLL_S)

    def _watch(self, process: psutil.Process, end: float) -> list[int]:
        """The server's memory in bytes, second by second."""
        samples = []
        while time.monotonic() < end:
            samples.append(int(process.memory_info().rss))
            time.sleep(_SAMPLE_S)
        return samples

    def _report(self, record: Record, memory: list[int]) -> None:
        failed = sum(one.status == "failed" for one in self._served)
        part = max(1, len(memory) // 6)
        early, late = median(memory[part : 2 * part] or memory), median(memory[-part:])
        record.add(
            videos=len(self._served) - failed,
            failed=failed,
            lost=self._lost,
            refused_for_a_full_queue=self._refused,
            **percentiles([one.queued_s for one in self._served] or [0.0], "queued_"),
            **percentiles([one.whole_s for one in self._served] or [0.0], "whole_"),
            memory_mib={"early": round(early / MIB), "late": round(late / MIB)},
            memory_growth=round(late / early, 4),
        )
        if self._lost or failed or not self._served:
            record.distrust([f"{self._lost} jobs lost, {failed} failed, {len(self._served)} ended"])
        if late > _GROWTH * early:
            record.distrust([f"the server's memory grew by {100 * (late / early - 1):.1f} %"])


def _json(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=120) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
