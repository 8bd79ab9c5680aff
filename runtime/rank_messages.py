"""The messages between the process of a pipeline and those of its other ranks, over a pipe."""

from __future__ import annotations

import io
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from stg_trt.engines.store import Build
from stg_trt.models.families.base import ModelFamily

from .run_inputs import RunInputs


@dataclass(frozen=True, eq=False)
class Load:
    """To a rank: load the engines of a build, and say that it is ready."""

    build: Build
    family: ModelFamily


@dataclass(frozen=True, eq=False)
class Begin:
    """To a rank: a run on a loaded build begins; the last run is over, whether it came to its end or not."""

    folder: Path
    inputs: RunInputs


@dataclass(frozen=True)
class Next:
    """To a rank: take the next step; `spread` says that the first rank's latents come before it."""

    spread: bool = False


@dataclass(frozen=True)
class Ready:
    """From a rank: it has started, or loaded what it was told to."""


@dataclass(frozen=True)
class Failed:
    """From a rank, which ends: what went wrong, in one line."""

    reason: str


Message = Load | Begin | Next | Ready | Failed


def send(connection: Connection, message: Message) -> None:
    """Tensors travel as their values; raises OSError if the other end is closed."""
    data = io.BytesIO()
    torch.save(message, data)
    connection.send_bytes(data.getbuffer())


def receive(connection: Connection) -> Message:
    """Waits for a message, whose tensors are on the CPU; raises EOFError or OSError at its end."""
    data = io.BytesIO(connection.recv_bytes())
    # Only this user's own processes hold the ends of the pipe.
    message: Message = torch.load(data, map_location="cpu", weights_only=False)
    return message
