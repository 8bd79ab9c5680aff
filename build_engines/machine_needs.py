"""What a build needs of the machine at least, told before the work starts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stg_trt.errors import InvalidRequest
from stg_trt.models.segment import Segment
from stg_trt.system.machine_memory import available_bytes
from stg_trt.system.units import GIB, MIB

from .options import BuildOptions

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class MachineNeeds:
    """Of segments that are still to be built, for so many targets each; all are lower bounds."""

    options: BuildOptions
    targets: Mapping[Segment, int]

    def check(self) -> None:
        """Raises InvalidRequest if disk or memory is too small for it."""
        output = _existing(self.options.output)
        free = shutil.disk_usage(output).free
        if self.disk_bytes > free:
            raise InvalidRequest(
                f"disk: expected at least {_shown(self.disk_bytes)} free in {output} for the engines, got "
                f"{_shown(free)}: free some, choose another --output, or build for fewer targets at once"
            )
        free = available_bytes()
        if self.memory_bytes > free:
            raise InvalidRequest(
                f"memory: expected at least {_shown(self.memory_bytes)} free for the largest block or "
                f"engine, got {_shown(free)}: end other programs, cut the model into smaller engines "
                "(--layout segmented, --max-segment-gib), or add swap space"
            )

    @cached_property
    def disk_bytes(self) -> int:
        """Of the engines, which hold the weights in the engine's precision."""
        return sum(self._engine_bytes(segment) * targets for segment, targets in self.targets.items())

    @cached_property
    def memory_bytes(self) -> int:
        """A block as it is read and as it is exported, or the weights of the engine that is compiled.

        ONNX Runtime compiles nothing, so that its engines are never in memory.
        """
        blocks = {block for segment in self.targets for block in segment.blocks}
        # One and the same in fp32.
        copies = {_FLOAT32_BYTES, self.options.weight_bytes}
        block_bytes = max((self.options.block_values[block] * sum(copies) for block in blocks), default=0)
        if self.options.backend.name == "onnxruntime":
            return block_bytes
        return max(block_bytes, max(map(self._engine_bytes, self.targets), default=0))

    def _engine_bytes(self, segment: Segment) -> int:
        """Without embedding and head, which are small."""
        return self.options.weight_bytes * sum(self.options.block_values[block] for block in segment.blocks)


def _existing(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _shown(size: int) -> str:
    """In GiB, or in MiB where that would be 0.0."""
    return f"{size / GIB:.1f} GiB" if size >= 0.05 * GIB else f"{size / MIB:.1f} MiB"
