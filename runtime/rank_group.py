"""The ranks that take the steps of a run together, a GPU each: every rank computes some of the passes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.distributed import FileStore, ProcessGroup, ProcessGroupGloo

from .operations import Operation

_MEETING = timedelta(minutes=2)
# A rank may compile or capture while others wait; one that has died is noticed by its process, not by this.
_EXCHANGE = timedelta(hours=1)


class RankGroup:
    """One rank's end of a group of `size`."""

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.rank = group.rank()
        self.size = group.size()
        self._group = group
        self._device = device

    @classmethod
    def meet(cls, folder: Path, rank: int, size: int, device: torch.device) -> RankGroup:
        """Waits for the other ranks, which were given the same empty folder.

        Torch's default group is left alone: it belongs to the user's program.
        """
        store = FileStore(str(folder / "ranks"), size)
        store.set_timeout(_MEETING)
        made = _nccl(store, rank, size) if device.type == "cuda" else _gloo(store, rank, size)
        return cls(made, device)

    def exchange(self, rows: Tensor, own: slice) -> Operation:
        """Gives all ranks the rows of each, of which this one has computed `own`.

        A sum of bytes of which all ranks but one have zeros is exact in every dtype.
        """
        others = [part for part in (rows[: own.start], rows[own.stop :]) if part.numel()]
        as_bytes = [rows.view(torch.uint8)]

        def enqueue(stream: int) -> None:
            for part in others:
                part.zero_()
            self._group.allreduce(as_bytes).wait()

        return enqueue

    def agree(self, able: bool) -> bool:
        """Whether all ranks are able; each of them must ask."""
        unable = torch.tensor([not able], dtype=torch.int32, device=self._device)
        self._group.allreduce([unable]).wait()
        return not unable.item()

    def abort(self) -> None:
        """Ends exchanges that wait for a rank that is gone; from any thread."""
        self._group.abort()


def _gloo(store: FileStore, rank: int, size: int) -> ProcessGroup:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # Torch's stubs lack it.
    options._timeout = _EXCHANGE
    # All ranks are on this machine.
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    # Torch's stubs do not say that it has a group's methods.
    return cast(ProcessGroup, ProcessGroupGloo(store, rank, size, options))


def _nccl(store: FileStore, rank: int, size: int) -> ProcessGroup:
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = _EXCHANGE
    return cast(ProcessGroup, ProcessGroupNCCL(store, rank, size, options))
