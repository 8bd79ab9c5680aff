"""The compiler of an inductor build of LTX-Video."""

from __future__ import annotations

from pathlib import Path

from stg_trt.build_engines.compile_inductor import InductorCompiler
from stg_trt.build_engines.options import BuildOptions
from stg_trt.engines.backends import backend_for
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.workload import Workload
from tests.support.family_cases import LTX, Sizes


def compiler_of(
    checkpoint: Path,
    output: Path,
    precision: str,
    target: str = "cpu",
    sizes: Sizes = LTX.sizes,
) -> InductorCompiler:
    workload = Workload(**sizes, precision=precision)
    options = BuildOptions(
        checkpoint=Checkpoint.open(checkpoint),
        output=output,
        workload=workload,
        skips={"skip": (3,)},
        stg_mode="stg-a",
        layout="segmented",
        max_batch=2,
        backend=backend_for("inductor"),
        targets=(target,),
        verify_timesteps=3,
        keep_onnx=False,
    )
    return InductorCompiler(options)
