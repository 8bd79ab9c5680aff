"""Eager float32 results of every segment at the real shape, for the numerics gate."""

from __future__ import annotations

import torch

from stg_trt.errors import GateMissed
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.keep_flags import (
    KEEP_ATTENTION,
    KEEP_AUDIO_ATTENTION,
    KEEP_CROSS,
    KEEP_LAYER,
)
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import kept_name
from stg_trt.models.workload import Workload

from .memory import release_growth
from .pieces import pieces_of
from .streamed_model import Change, State, unchanged

_CPU = torch.device("cpu")


class Reference:
    """The chain of segments run eagerly, piece by piece, at some timesteps of the schedule.

    Inputs of a piece are the eager outputs of those before it. Segments whose engines were re-used are
    only run when a later segment needs their results. `change` is made to every piece, such as FP8 layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        workload: Workload,
        segments: tuple[Segment, ...],
        timesteps: int,
        rows: int,
        device: torch.device = _CPU,
        change: Change = unchanged,
    ) -> None:
        self.checkpoint = checkpoint
        self.family = checkpoint.family
        self.workload = workload
        self.segments = segments
        self.device = device
        self.change = change
        self.timesteps = _spread(self._schedule(), timesteps)
        self._states = [self._start(timestep, rows) for timestep in self.timesteps]
        self._done: set[Segment] = set()

    def module(self, segment: Segment, *, expand_masks: bool) -> SegmentModule:
        """A segment or piece in float32, with no other weights in memory, and rounded as the engine's.

        So the comparison tests the graph, and not the rounding of the weights, which was asked for.
        """
        transformer = self.checkpoint.load_transformer(segment.blocks, segment.expert, ends=segment.has_ends)
        module = self.family.module(transformer, segment, expand_masks=expand_masks).eval()
        assert not any(weight.is_meta for weight in module.parameters()), (
            f"{type(self.family).__name__}: a block reads a weight of no block that is not in shared_weights"
        )
        self.change(segment, module)
        self.family.lower_precision(module, getattr(torch, self.workload.dtype))
        # Memory freed in rounding is scattered between what was kept: give it back before the next copy.
        release_growth()
        return module.float()

    def inputs(self, segment: Segment) -> list[State]:
        """Inputs of a segment, one set per timestep; first runs earlier segments if needed."""
        if self.timesteps:
            for earlier in self.segments[: self.segments.index(segment)]:
                # An expert's first segments write anew what those of the one before it have left.
                if earlier.expert == segment.expert and earlier not in self._done:
                    for piece in pieces_of(earlier):
                        self.run(piece, self.module(piece, expand_masks=False))
                    self.outputs(earlier)
        return self._named(self.family.borders(segment)[0])

    def outputs(self, segment: Segment) -> list[State]:
        """Outputs of a segment, one set per timestep, after its last piece was run."""
        self._done.add(segment)
        return self._named(self.family.borders(segment)[1])

    def _named(self, names: tuple[str, ...]) -> list[State]:
        return [{name: state[name] for name in names} for state in self._states]

    def run(self, piece: Segment, module: SegmentModule) -> tuple[list[State], list[State]]:
        """Inputs and eager outputs of the next piece or segment, a set per timestep, on the CPU."""
        every_input, outputs = self._named(self.family.borders(piece)[0]), []
        try:
            with torch.no_grad():
                for state, inputs in zip(self._states, every_input, strict=True):
                    tensors = module.to(self.device)(*(tensor.to(self.device) for tensor in inputs.values()))
                    results = {name: t.to(_CPU) for name, t in zip(module.outputs, tensors, strict=True)}
                    outputs.append(results)
                    state |= results
        except torch.OutOfMemoryError as error:
            raise GateMissed(
                f"{piece.name}: expected GPU memory for the block in float32, got none left: free some, "
                "or use --verify-timesteps 0"
            ) from error
        module.to(_CPU)
        return every_input, outputs

    def _schedule(self) -> list[float]:
        scheduler = self.checkpoint.scheduler()
        self.family.set_timesteps(scheduler, self.family.defaults.num_inference_steps, self.workload)
        return [float(timestep) for timestep in scheduler.timesteps]

    def _start(self, timestep: float, rows: int) -> State:
        """Random latents and text."""
        generator = torch.Generator().manual_seed(int(timestep))
        text = self.family.random_text(self.workload, rows, generator)
        image = self.family.random_image(self.workload, rows, generator)
        constants = self.family.constants(text, self.workload, self.family.defaults.frame_rate, image)
        tensors = self.family.tensors(self.workload)
        return {
            **constants,
            # Every row reads its own.
            **{name: torch.arange(rows) for name in tensors if kept_name(name)},
            **{
                stream.latents: torch.randn(tensors[stream.latents].with_rows(rows), generator=generator)
                for stream in self.family.streams
            },
            "timestep": torch.full((rows,), timestep),
            # The last row skips its attention, so that both branches of the switch are compared.
            KEEP_ATTENTION: torch.arange(rows) != rows - 1,
            KEEP_AUDIO_ATTENTION: torch.arange(rows) < rows - 1,
            # And of several rows the first skips the whole layer.
            KEEP_LAYER: torch.arange(1, rows + 1) != rows // 2,
            KEEP_CROSS: torch.arange(1, rows + 1) != rows // 2,
        }


def _spread(values: list[float], count: int) -> list[float]:
    """First, middle and last for 3; none for 0."""
    if count <= 1:
        return values[:count]
    last = len(values) - 1
    return [values[round(i * last / (count - 1))] for i in range(count)]
