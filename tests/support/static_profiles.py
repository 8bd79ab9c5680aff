"""The profiles of a build for TensorRT, for engines that the tests run on a stand-in for it."""

from __future__ import annotations

from dataclasses import replace

from stg_trt.build_engines.compile_tensorrt import TensorRTCompiler
from stg_trt.build_engines.options import BuildOptions
from stg_trt.engines.backends import backend_for
from stg_trt.engines.store import Build
from tests.support.family_cases import FamilyCase


def static_profiles(case: FamilyCase, build: Build) -> dict[bytes, tuple[tuple[int, int], ...]]:
    """By engine, the (min, max) rows of the profiles that its segment has in a build for TensorRT."""
    manifest = build.manifest
    options = BuildOptions(
        checkpoint=case.checkpoint,
        output=build.folder,
        workload=replace(manifest.workload, precision="bf16"),
        skips=manifest.skips,
        stg_mode=manifest.stg_mode,
        layout=manifest.layout,
        max_batch=manifest.max_batch,
        backend=backend_for("tensorrt"),
        targets=("this-gpu",),
        verify_timesteps=0,
        keep_onnx=False,
    )
    compiler = TensorRTCompiler(options)
    return {
        (build.folder / record.files[0].name).read_bytes(): tuple(
            (low, high) for low, _, high in compiler.profiles(record.segment)
        )
        for record in manifest.segments
    }
