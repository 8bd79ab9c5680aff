"""A step program as one captured CUDA graph, checked against a plain run before it is used."""

from __future__ import annotations

import warnings

import torch

from .device import Device, Graph
from .state import StepState
from .step import Step

_WARMUPS = 2
_MAX_RELATIVE = 1e-3


class StepGraph:
    """Replays a program; where it cannot be captured, says so once and runs it plainly.

    The memory it was captured on belongs to `state`, which lives as long as the graph.
    """

    def __init__(self, program: Step, state: StepState, device: Device) -> None:
        self.plan = program.plan
        self._program = program
        self._device = device
        self._graph: Graph | None = None
        try:
            self._graph = self._captured(state)
        except RuntimeError as error:
            warnings.warn(f"CUDA graph: capture failed, steps run without one: {error}", stacklevel=2)

    @property
    def nodes(self) -> int:
        """Nodes of the captured graph; 0 where steps run without one."""
        return self._graph.nodes if self._graph is not None else 0

    def enqueue(self) -> None:
        """One step."""
        if self._graph is not None:
            self._graph.replay()
            return
        self._program.enqueue()

    def _captured(self, state: StepState) -> Graph:
        """Warm-up, capture, one replay compared with the plain run; leaves the state as it was."""
        saved = state.snapshot()
        for _ in range(_WARMUPS):
            # The first enqueues after a shape change may allocate and compile, which a capture may not.
            self._program.enqueue()
            plain = state.latents.clone()
            state.restore(saved)
        graph = self._device.capture(self._program.enqueue)
        if graph.nodes == 0:
            raise RuntimeError("expected work in the graph, got no nodes")
        state.restore(saved)
        graph.replay()
        difference = (state.latents - plain).abs().max() / plain.abs().max().clamp_min(1e-6)
        state.restore(saved)
        if not bool(torch.isfinite(difference)) or float(difference) > _MAX_RELATIVE:
            raise RuntimeError(
                f"expected the replay to equal the plain run, got a difference of {difference:.1e}"
            )
        return graph
