"""Whole builds of a model with random weights: what they cost and what the gates found."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from stg_trt.build_engines.build import build
from stg_trt.build_engines.display import BuildDisplay, print_summary
from stg_trt.engines.float8_record import Float8Record
from stg_trt.engines.manifest import Manifest, SegmentRecord, load
from stg_trt.models.workload import FLOAT8

from . import record


@dataclass(frozen=True)
class BuildBenchmark:
    """Builds every mode and layout for every target; each exports once and compiles per target.

    None is the family's own mode, blocks or text length; `blocks` shortens the model.
    """

    checkpoint: str
    height: int
    width: int
    num_frames: int
    text_length: int | None
    stg_blocks: tuple[int, ...] | None
    stg_modes: tuple[str | None, ...]
    blocks: tuple[int, ...] | None
    layouts: tuple[str, ...]
    backend: str
    target: str
    verify_timesteps: int
    precision: str | None = None

    def run(self, output: Path, engines: Path | None) -> None:
        """Builds, prints the tables and writes the JSON; what is done is kept after each."""
        blocks = None if self.blocks is None else list(self.blocks)
        results = record.Record(output, "build", model=self.checkpoint, blocks=blocks, builds=[])
        with ExitStack() as stack:
            root = engines or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for mode, layout in product(self.stg_modes, self.layouts):
                start = time.perf_counter()
                folders = self._build(mode, layout, root)
                wall = round(time.perf_counter() - start, 1)
                done = results.result["builds"]
                for folder in folders:
                    manifest = load(folder)
                    print_summary(folder, manifest)
                    done.append({**_build_result(manifest), "wall_s_all_targets": wall})
                results.add()
            results.finish()

    def _build(self, stg_mode: str | None, layout: str, root: Path) -> list[Path]:
        with BuildDisplay() as display:
            folders: list[Path] = build(
                self.checkpoint,
                root,
                height=self.height,
                width=self.width,
                num_frames=self.num_frames,
                text_length=self.text_length,
                stg_blocks=self.stg_blocks,
                stg_mode=stg_mode,
                layout=layout,
                backend=self.backend,
                target=self.target,
                random_weights=True,
                blocks=self.blocks,
                verify_timesteps=self.verify_timesteps,
                precision=self.precision,
                # The inputs of random weights are much the same at every step; schedulers want two.
                calibration_steps=2 if self.precision == FLOAT8 else None,
                progress=display,
            )
        return folders


def _build_result(manifest: Manifest) -> dict[str, Any]:
    segments = [_segment_result(segment) for segment in manifest.segments]
    float8 = manifest.float8
    return {
        "layout": manifest.layout,
        "backend": manifest.backend,
        "target": manifest.target,
        "workload": {"precision": manifest.workload.precision, "size": str(manifest.workload)},
        "text_length": manifest.workload.text_length,
        "stg_mode": manifest.stg_mode,
        "stg_blocks": list(manifest.stg_blocks),
        "engine_bytes": manifest.engine_bytes,
        "fused_attentions": _total([segment["fused_attentions"] for segment in segments]),
        "peak_bytes": manifest.peak_bytes,
        "float8": None if float8 is None else _float8_result(float8),
        "segments": segments,
    }


def _float8_result(float8: Float8Record) -> dict[str, Any]:
    """How many layers are FP8, and what that changes."""
    return {
        "layers": len(float8.largest_inputs),
        "kept_blocks": list(float8.kept_blocks),
        "pred_error": float8.pred_error,
        "skip_error": float8.skip_error,
    }


def _total(counts: Sequence[int | None]) -> int | None:
    """The sum; None if one of them is not known."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _segment_result(segment: SegmentRecord) -> dict[str, Any]:
    return {
        "name": segment.segment.name,
        "seconds": segment.seconds,
        "peak_bytes": segment.peak_bytes,
        "engine_bytes": segment.engine_bytes,
        "attentions": segment.attentions,
        "fused_attentions": segment.fused_attentions,
        "activation_bytes": segment.activation_bytes,
        "tflop_per_row": round(segment.flops / 1e12, 3),
        "verification": [verification.model_dump() for verification in segment.verification],
    }
