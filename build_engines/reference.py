"""Eager float32 results of every segment at the real shape, for the numerics gate."""

from __future__ import annotations

import torch
from torch import Tensor

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

State = dict[str, Tensor]

_CPU = torch.device("cpu")


class Reference:
    """The chain of segments run eagerly, segment by segment, at some timesteps of the schedule.

    Inputs of a segment are the eager outputs of those before it. Segments whose engines were re-used are
    only run when a later segment needs their results.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        workload: Workload,
        segments: tuple[Segment, ...],
        timesteps: int,
        rows: int,
        device: torch.device = _CPU,
    ) -> None:
        self.checkpoint = checkpoint
        self.family = checkpoint.family
        self.workload = workload
        self.segments = segments
        self.device = device
        self.timesteps = _spread(self._schedule(), timesteps)
        self._states = [self._start(timestep, rows) for timestep in self.timesteps]
        self._done: set[Segment] = set()

    def module(self, segment: Segment, *, expand_masks: bool) -> SegmentModule:
        """The segment in float32, with no other weights in memory; its weights are rounded as the engine's.

        So the comparison tests the graph, and not the rounding of the weights, which was asked for.
        """
        transformer = self.checkpoint.load_transformer(segment.blocks, segment.expert)
        module = self.family.module(transformer, segment, expand_masks=expand_masks).eval()
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
                    self.run(earlier, self.module(earlier, expand_masks=False))
        names = self.family.borders(segment)[0]
        return [{name: state[name] for name in names} for state in self._states]

    def run(self, segment: Segment, module: SegmentModule) -> list[State]:
        """Eager outputs of a segment, one set per timestep; they and the module are on the CPU afterwards."""
        outputs = []
        try:
            with torch.no_grad():
                for state, inputs in zip(self._states, self.inputs(segment), strict=True):
                    tensors = module.to(self.device)(*(tensor.to(self.device) for tensor in inputs.values()))
                    results = {name: t.to(_CPU) for name, t in zip(module.outputs, tensors, strict=True)}
                    outputs.append(results)
                    state |= results
        except torch.OutOfMemoryError as error:
            raise GateMissed(
                f"{segment.name}: expected GPU memory for the segment in float32, got none left: free some, "
                "or use the segmented layout or --verify-timesteps 0"
            ) from error
        module.to(_CPU)
        self._done.add(segment)
        return outputs

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
