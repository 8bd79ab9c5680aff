"""The other ranks of a pipeline: processes that take its steps with it, each on a GPU of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from stg_trt.engines.store import Build
from stg_trt.errors import BackendUnavailable, RankLost, StgTrtError
from stg_trt.models.families.base import ModelFamily

from .device import Device
from .rank_group import RankGroup
from .rank_messages import Begin, Failed, Load, Message, Next, Ready, receive, send
from .run_inputs import RunInputs
from .sampler import SampledStep, Sampler

_START_S = 120.0
# Until a process that is gone has been noticed, after an exchange with it has failed.
_NOTICE_S = 5.0
_END_S = 5.0


@dataclass(frozen=True)
class _Process:
    """A rank's process, and this end of its pipe."""

    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection


class RunningRanks:
    """Processes of ranks 1 and up, from their start to their end; raises RankLost if one does not start."""

    def __init__(self, size: int, device: Device) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="stg-trt-ranks-"))
        self._ready = threading.Semaphore(0)
        self._ended = threading.Event()
        self._lost: str | None = None
        self._group: RankGroup | None = None
        name = device.torch_device.type
        self._processes = [_start(self._folder, rank, size, name) for rank in range(1, size)]
        self.close = weakref.finalize(self, _end, self._folder, self._processes)
        try:
            self._group = self._meet(size, device)
        except BaseException:
            self.close()
            raise

    def _meet(self, size: int, device: Device) -> RankGroup:
        for one in self._processes:
            threading.Thread(target=_watch, args=(weakref.ref(self), one), daemon=True).start()
        if not self.wait(_START_S):
            self.lose(f"it did not start in {_START_S:.0f} s")
            self.check()
        return RankGroup.meet(self._folder, 0, size, device.torch_device)

    @property
    def group(self) -> RankGroup:
        """This process's end, as rank 0."""
        assert self._group is not None
        return self._group

    @property
    def ended(self) -> bool:
        """Whether a rank is gone."""
        return self._lost is not None

    def wait(self, seconds: float | None = None) -> bool:
        """Until every rank has said that it is ready; False if one has not in time. Raises RankLost."""
        for _ in self._processes:
            is_ready = self._ready.acquire(timeout=seconds)
            self.check()
            if not is_ready:
                return False
        return True

    def tell(self, message: Message) -> None:
        """Sends a message to all."""
        for one in self._processes:
            with suppress(OSError):  # One that is gone is noticed by its watch.
                send(one.connection, message)

    def hear(self, message: Message) -> None:
        """Notes a message of a rank."""
        if isinstance(message, Ready):
            self._ready.release()
        elif isinstance(message, Failed):
            self.lose(message.reason)

    def lose(self, reason: str) -> None:
        """Notes that a rank is gone, for the first reason that is given, and frees who waits for it."""
        self._lost = self._lost or reason
        self._ready.release()
        self._ended.set()
        if self.close.alive and self._group is not None:
            self._group.abort()

    def check(self, wait_s: float = 0.0) -> None:
        """Raises RankLost if a process has ended, or does so in `wait_s` seconds."""
        self._ended.wait(wait_s)
        if self._lost is not None:
            raise RankLost(
                "guidance_parallel: expected every rank to take all steps, got the end of one "
                f"({self._lost}): call again, which starts the ranks anew"
            )


class Ranks:
    """Starts the other ranks with the first run, and again after one was lost."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._running: RunningRanks | None = None

    def group(self, device: Device) -> RankGroup:
        """This process's end, as rank 0; raises BackendUnavailable if there are too few GPUs."""
        if self._running is None or self._running.ended:
            _check_gpus(self._size, device)
            self._running = RunningRanks(self._size, device)
        return self._running.group

    def has(self, group: RankGroup | None) -> bool:
        """Whether the group's processes are those that run now."""
        running = self._running
        return running is not None and not running.ended and running.group is group

    @contextmanager
    def loading(self, build: Build, family: ModelFamily) -> Iterator[None]:
        """Inside it, the other ranks load a build too; raises RankLost if one of them ends."""
        running = self._running
        assert running is not None
        running.tell(Load(build, family))
        with self._together(running):
            yield
            running.wait()

    def steps(self, sampler: Sampler, build: Build, inputs: RunInputs) -> Iterator[SampledStep]:
        """The steps of a run on a loaded build, which all ranks take; raises RankLost as `loading`."""
        running = self._running
        assert running is not None
        generator = inputs.generator
        if generator is None:
            # The other ranks draw what this process's default generator draws.
            generator = torch.Generator().set_state(torch.get_rng_state())
        running.tell(Begin(build.folder, replace(inputs, generator=generator)))
        steps, spread = sampler.steps(inputs), False
        for _ in range(inputs.guidance.num_steps):
            running.tell(Next(spread))
            with self._together(running):
                if spread:
                    sampler.spread_latents()
                step = next(steps)
            try:
                yield step
            except GeneratorExit:
                return
            spread = step.replaced
        with self._together(running):
            # A rank that is lost after its part of the last step was not missed.
            sampler.wait()

    @contextmanager
    def _together(self, running: RunningRanks) -> Iterator[None]:
        """After a failure the ranks may no longer be at the same place, so they end."""
        try:
            yield
            running.check()
        except BaseException as error:
            try:
                if isinstance(error, Exception) and not isinstance(error, StgTrtError):
                    running.check(_NOTICE_S)
            finally:
                running.close()
                if self._running is running:
                    self._running = None
            raise


def _check_gpus(size: int, device: Device) -> None:
    if device.torch_device.type != "cuda":
        return
    found = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if len(found) < size or len(set(found[:size])) > 1 or torch.cuda.current_device() != 0:
        raise BackendUnavailable(
            f"guidance_parallel: expected {size} GPUs that are alike, and cuda:0 as the current one, got "
            f"{', '.join(found)} and cuda:{torch.cuda.current_device()}: set CUDA_VISIBLE_DEVICES"
        )


def _start(folder: Path, rank: int, size: int, device_name: str) -> _Process:
    ours, theirs = Pipe()
    with theirs:
        command = [sys.executable, "-m", "stg_trt.runtime.rank_worker"]
        arguments = [str(theirs.fileno()), str(folder), str(rank), str(size), device_name]
        process = subprocess.Popen(
            [*command, *arguments], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
        )
    return _Process(rank, process, ours)


def _watch(ranks: weakref.ref[RunningRanks], one: _Process) -> None:
    """Hears a rank until its pipe is closed, which is at the latest the end of its process."""
    with suppress(EOFError, OSError):
        while True:
            message = receive(one.connection)
            if (running := ranks()) is not None:
                running.hear(message)
            del running
    if (running := ranks()) is not None:
        running.lose(f"rank {one.rank} {_how_it_ended(one.process)}")


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    try:
        status = process.wait(_END_S)
    except subprocess.TimeoutExpired:
        return "closed its pipe"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _end(folder: Path, processes: Sequence[_Process]) -> None:
    """Shuts the pipes, which ends the processes."""
    for one in processes:
        # Closing it alone would leave it open for the thread that reads from it.
        with suppress(OSError), socket.socket(fileno=os.dup(one.connection.fileno())) as pipe:
            pipe.shutdown(socket.SHUT_RDWR)
    for one in processes:
        try:
            one.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
    shutil.rmtree(folder, ignore_errors=True)
