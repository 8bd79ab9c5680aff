"""Ranks as threads of one process, over real exchanges, with a sampler each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from stg_trt.runtime.rank_group import RankGroup
from stg_trt.runtime.sampler import Sampler

T = TypeVar("T")


def on_ranks(folder: Path, samplers: Sequence[Sampler], work: Callable[[Sampler], T]) -> list[T]:
    """What `work` returns on every rank; `folder` is empty."""

    def of_rank(rank: int) -> T:
        samplers[rank].ranks = RankGroup.meet(folder, rank, len(samplers), torch.device("cpu"))
        with torch.no_grad():
            return work(samplers[rank])

    with ThreadPoolExecutor(len(samplers)) as pool:
        return list(pool.map(of_rank, range(len(samplers))))
