"""A rank other than the first, in a process of its own: takes the steps that the first rank takes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import torch

from stg_trt.errors import is_out_of_memory

from .device import Device, open_device
from .rank_group import RankGroup
from .rank_messages import Begin, Failed, Load, Message, Next, Ready, receive, send
from .sampler import SampledStep, Sampler


class RankWorker:
    """One sampler for each build that it was told to load; `connection` is to the first rank."""

    def __init__(self, connection: Connection, group: RankGroup, device: Device) -> None:
        self._connection = connection
        self._group = group
        self._device = device
        self._samplers: dict[Path, Sampler] = {}
        self._sampler: Sampler | None = None
        self._steps: Iterator[SampledStep] | None = None

    def obey(self, message: Message) -> None:
        """Does what the first rank says."""
        if isinstance(message, Load):
            self._load(message)
            send(self._connection, Ready())
        elif isinstance(message, Begin):
            self._sampler = self._samplers[message.folder]
            self._steps = self._sampler.steps(message.inputs)
        elif isinstance(message, Next):
            assert self._sampler is not None and self._steps is not None
            if message.spread:
                self._sampler.spread_latents()
            next(self._steps)

    def _load(self, message: Load) -> None:
        build = message.build
        if build.folder not in self._samplers:
            engines = build.load_engines(self._device)
            made = Sampler(message.family, build.manifest, engines, self._device, self._group)
            self._samplers[build.folder] = made


def _read(connection: Connection, inbox: SimpleQueue[Message]) -> None:
    """Ends the process with the first rank's, even while an exchange waits for that."""
    try:
        while True:
            inbox.put(receive(connection))
    except (EOFError, OSError):
        os._exit(0)


@torch.no_grad()
def work(connection: Connection, folder: Path, rank: int, size: int, device_name: str) -> None:
    """Takes steps until the first rank's end of the pipe is closed, or one fails."""
    inbox: SimpleQueue[Message] = SimpleQueue()
    try:
        if device_name == "cuda":
            torch.cuda.set_device(rank)
        device = open_device(device_name)
        send(connection, Ready())
        threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
        worker = RankWorker(connection, RankGroup.meet(folder, rank, size, device.torch_device), device)
        while True:
            worker.obey(inbox.get())
    except Exception as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        send(connection, Failed(f"rank {rank}: {'out of memory: ' * is_out_of_memory(error)}{said}"))
        sys.exit(1)


if __name__ == "__main__":
    # Ctrl-C reaches all processes of a terminal; the first rank ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe, place, own_rank, ranks, on = sys.argv[1:]
    work(Connection(int(pipe)), Path(place), int(own_rank), int(ranks), on)
