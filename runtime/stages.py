"""Where the seconds of a call go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

Stage = Literal["load", "text", "image", "denoise", "decode", "encode"]
"""In their order: reading weights, prompts to embeddings, pictures to latents, the steps with all that no
other stage counts, latents to frames and sound, and writing files."""

STAGES: tuple[Stage, ...] = get_args(Stage)


class StageClock:
    """Every moment counts for one stage, so that the stages of a call add up to the whole.

    On a GPU, the end of a stage waits for its work.
    """

    def __init__(self) -> None:
        self._now: list[Stage | None] = []
        self._since = 0.0
        self._seconds: dict[Stage, float] = {}

    @property
    def seconds(self) -> dict[Stage, float]:
        """Of the call so far, in the order of the stages; those that it has not come to are missing."""
        self._count()
        return {stage: self._seconds[stage] for stage in STAGES if stage in self._seconds}

    @contextmanager
    def call(self) -> Iterator[None]:
        """A new call, which is denoising wherever it is in no other stage."""
        self._seconds = {}
        with self.stage("denoise"):
            yield

    @contextmanager
    def stage(self, stage: Stage | None) -> Iterator[None]:
        """Inside it, seconds count for a stage alone; None is time that is not the call's own."""
        self._count()
        self._now.append(stage)
        try:
            yield
        except BaseException:
            # A GPU that has failed says so again when it is waited for.
            self._count(wait=False)
            raise
        else:
            self._count()
        finally:
            self._now.pop()

    def _count(self, wait: bool = True) -> None:
        if wait and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now, stage = time.perf_counter(), self._now[-1] if self._now else None
        if stage is not None:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._since
        self._since = now
