"""What benchmarks measure in the tests."""

from __future__ import annotations

from pathlib import Path

from stg_trt.benchmarks.scenario import Scenario
from tests.support.family_cases import FamilyCase


def scenario_of(
    case: FamilyCase, mode: str, blocks: tuple[int, ...], checkpoint: Path | None = None
) -> Scenario:
    """A family's tiny transformer, or another checkpoint, at the size of its goldens, on ONNX Runtime."""
    sizes = (case.workload.height, case.workload.width, case.workload.num_frames, case.workload.text_length)
    source = str(checkpoint or case.goldens)
    return Scenario(source, *sizes, stg_mode=mode, stg_blocks=blocks, backend="onnxruntime")
