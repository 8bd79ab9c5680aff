"""A step as one captured CUDA graph, checked against a plain run before it is used."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stg_trt.system.callers import level_outside

from .device import Device, Graph
from .state import RunState, Snapshot
from .step import Step

_log = logging.getLogger(__name__)
_WARMUPS = 2
_MAX_RELATIVE = 1e-3


class StepGraph:
    """Replays a captured step; if it cannot be captured, warns once and runs it plainly.

    The memory it was captured on belongs to `state`, which lives as long as the graph.
    """

    def __init__(self, step: Step, state: RunState, device: Device) -> None:
        self.plan = step.plan
        self._graph = _captured(step, state, device)
        replay = step.enqueue if self._graph is None else self._graph.replay
        self._run = device.named(f"replay {step.key.name}", lambda stream: replay())
        self._stream = device.stream

    @property
    def nodes(self) -> int | None:
        """Nodes of the captured graph; 0 if steps run without one, None if they cannot be counted."""
        return self._graph.nodes if self._graph is not None else 0

    def enqueue(self) -> None:
        """One step."""
        self._run(self._stream)


@dataclass(frozen=True)
class _Outcome:
    """A step's results: every stream's predictions (rows, ...) and change of its latents (videos, ...), and
    its next step."""

    values: tuple[Tensor, ...]
    counters: Tensor

    @classmethod
    def of(cls, step: Step, state: RunState, start: Sequence[Snapshot]) -> _Outcome:
        # Predictions too: a schedule may scale them down so far that the latents hardly show them.
        preds = [stream.pred_rows(step.key.groups).to(torch.float32, copy=True) for stream in state.streams]
        changes = [stream.latents - old.latents for stream, old in zip(state.streams, start, strict=True)]
        return cls((*preds, *changes), torch.cat([stream.table.counter for stream in state.streams]))

    def distance(self, expected: _Outcome) -> float:
        """The largest relative difference of a row; inf for another next step, NaN if rows are NaN."""
        if not torch.equal(self.counters, expected.counters):
            return math.inf
        pairs = zip(self.values, expected.values, strict=True)
        return float(torch.stack([_relative(got, wanted) for got, wanted in pairs]).max())


def _captured(step: Step, state: RunState, device: Device) -> Graph | None:
    """The step's graph; None, with a warning, if no captured graph equals the plain step."""
    start = state.snapshot()
    for _ in range(_WARMUPS):
        # The first runs after a shape change may allocate and compile, which a capture may not.
        step.enqueue()
        plain = _Outcome.of(step, state, start)
        state.restore(start)
    graph = _attempt(step, device)
    state.restore(start)
    # A rank that replays beside one that cannot would wait for an exchange that never comes.
    if not step.every_rank(graph is not None) or graph is None:
        return None
    step.poison()
    graph.replay()
    distance = _Outcome.of(step, state, start).distance(plain)
    state.restore(start)
    if not distance <= _MAX_RELATIVE:
        _warn(
            f"expected the replay to equal the plain run, got a difference of {distance:.1e}: "
            "these steps run without one"
        )
        return None
    _log.info("captured %s: %s nodes", step.key.name, graph.nodes)
    return graph


def _attempt(step: Step, device: Device) -> Graph | None:
    """The step's graph, which may be wrong; None, with a warning, if there is none."""
    try:
        graph = device.capture(step.enqueue)
    except RuntimeError as error:
        device.stop_capturing()
        _warn(f"capture failed ({str(error).splitlines()[0]}), all steps of this process run without one")
        return None
    if graph.nodes == 0:
        _warn("expected work in the graph, got no nodes: these steps run without one")
        return None
    return graph


def _warn(message: str) -> None:
    _log.info("not captured: %s", message)
    warnings.warn(f"CUDA graph: {message}", stacklevel=level_outside())


def _relative(got: Tensor, expected: Tensor) -> Tensor:
    """The largest difference of each row over its largest value, of the worst row."""
    difference = (got - expected).flatten(1).abs().amax(1)
    largest = expected.flatten(1).abs().amax(1)
    return (difference / largest.clamp_min(torch.finfo(torch.float32).tiny)).max()
