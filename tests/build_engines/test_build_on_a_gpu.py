"""TensorRT builds for the GPU of this machine, over a strict stand-in for the library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stg_trt import build
from stg_trt.build_engines import compile_tensorrt
from stg_trt.build_engines.compiler import Compiled
from stg_trt.build_engines.tensorrt_recipe import Recipe
from stg_trt.engines import manifest as manifests
from stg_trt.engines.manifest import SegmentRecord
from stg_trt.engines.store import check_file
from stg_trt.errors import BackendUnavailable, GateMissed, InvalidRequest, OutOfDeviceMemory
from tests.support.build_gpu import H100, place_gpu, simulated_build
from tests.support.simulated_builder import SimulatedTensorRTBuilder, kernel_names
from tests.support.tiny_graph import INPUT, write_attentions

SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 9, "text_length": 4, "stg_blocks": []}
ATTENTIONS = 2


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> SimulatedTensorRTBuilder:
    return simulated_build(monkeypatch)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(
        graph=write_attentions(tmp_path / "back.onnx", ATTENTIONS),
        inputs=(INPUT,),
        profiles=((2, 2, 2), (3, 3, 3)),
        backend="tensorrt",
        target="this-gpu",
        timing_cache=tmp_path / "tensorrt.timings",
    )


def compiled(recipe: Recipe) -> Compiled:
    return compile_tensorrt.compile_tensorrt(recipe, ATTENTIONS, lambda phase: None)


def build_one_block(one_block: Path, folder: Path, **options: Any) -> Path:
    call = {"backend": "tensorrt", "verify_timesteps": 0, **SIZE, **options}
    (built,) = build(one_block, folder, **call)
    return built


@pytest.mark.parametrize("lists_all_profiles", [True, False])
def test_the_inspector_counts_kernels_that_enterprise_tensorrt_names(
    sim: SimulatedTensorRTBuilder, recipe: Recipe, lists_all_profiles: bool
) -> None:
    sim.lists_all_profiles = lists_all_profiles
    sim.device_memory_bytes = 12345
    result = compiled(recipe)
    assert (result.fused_attentions, result.activation_bytes) == (ATTENTIONS, 12345)
    assert result.files == (recipe.engine, recipe.layers)
    assert "__mye801_gemm_mha_v2" in kernel_names(recipe.layers)
    assert [profile.shapes["prompt_embeds"][1][0] for profile in sim.configs[0].profiles] == [2, 3]


def test_an_attention_that_is_decomposed_is_noticed(sim: SimulatedTensorRTBuilder, recipe: Recipe) -> None:
    sim.name_kernel = lambda number: None if number == 3 else f"_gemm_mha_v2_myl0_{number}"
    assert compiled(recipe).fused_attentions == 3


def test_names_of_another_format_decide_nothing(sim: SimulatedTensorRTBuilder, recipe: Recipe) -> None:
    sim.name_kernel = lambda number: f"new_kernel_{number}"
    assert compiled(recipe).fused_attentions is None


def test_no_kernel_is_timed_twice(sim: SimulatedTensorRTBuilder, recipe: Recipe) -> None:
    compiled(recipe)
    timed = len(sim.timed)
    assert timed > 0
    compiled(recipe)
    assert len(sim.timed) == timed
    # Timings of another GPU or version are not those of this one, and damaged ones are none.
    sim.gpu = "A100"
    compiled(recipe)
    assert len(sim.timed) == 2 * timed
    assert recipe.timing_cache is not None
    recipe.timing_cache.write_bytes(b"damaged")
    compiled(recipe)
    assert len(sim.timed) == 3 * timed


def test_timings_that_cannot_be_kept_do_not_lose_the_engine(
    sim: SimulatedTensorRTBuilder, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("stg_trt.build_engines.timing_cache.write_atomically", refuse)
    with pytest.warns(UserWarning, match=r"timings: timings .* cannot be kept .Permission denied., the next"):
        assert compiled(recipe).fused_attentions == ATTENTIONS
    assert recipe.engine.exists()


def test_timings_that_cannot_be_read_do_not_stop_a_build(
    sim: SimulatedTensorRTBuilder, recipe: Recipe
) -> None:
    assert recipe.timing_cache is not None
    recipe.timing_cache.mkdir()
    with pytest.warns(UserWarning, match=r"timings of kernels cannot be (read|kept)"):
        assert compiled(recipe).fused_attentions == ATTENTIONS


@pytest.mark.parametrize("level", [None, 5])
def test_the_optimization_level_reaches_the_builder(
    sim: SimulatedTensorRTBuilder, recipe: Recipe, level: int | None
) -> None:
    compiled(replace(recipe, builder_optimization_level=level))
    assert sim.configs[0].builder_optimization_level == (level or 3)


@pytest.mark.parametrize(
    ("call", "says", "error", "message"),
    [
        (
            "Builder",
            "CUDA initialization failure with error: 35",
            BackendUnavailable,
            "tensorrt 11.0.0: expected an NVIDIA driver that is new enough for its CUDA version, got an",
        ),
        (
            "Runtime",
            "no CUDA-capable device is detected",
            BackendUnavailable,
            "tensorrt 11.0.0: expected a GPU that it can use, got no CUDA-capable device is detected: check",
        ),
        (
            "build_serialized_network_to_stream",
            "[virtualMemoryBuffer.cpp::resizePhysical] Error Code 2: OutOfMemory (Requested 9 bytes.)",
            OutOfDeviceMemory,
            "back: expected enough free GPU memory to try tensorrt's kernels in, got .*OutOfMemory .*: free",
        ),
        (
            "build_serialized_network_to_stream",
            "Could not find any implementation for node Attention",
            GateMissed,
            "back: tensorrt cannot compile it: Could not find any implementation for node Attention: look",
        ),
    ],
    ids=["old driver", "no device", "memory", "no kernel"],
)
def test_a_compilation_that_fails_says_why_in_one_line(
    sim: SimulatedTensorRTBuilder,
    recipe: Recipe,
    call: str,
    says: str,
    error: type[Exception],
    message: str,
) -> None:
    sim.failing.add(call)
    sim.says = [says]
    with pytest.raises(error, match=f"^{message}"):
        compiled(recipe)


def test_without_a_gpu_a_build_for_it_is_refused_in_one_line(
    sim: SimulatedTensorRTBuilder, tmp_path: Path, one_block: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_gpu(monkeypatch, None)
    with pytest.raises(BackendUnavailable) as caught:
        build_one_block(one_block, tmp_path / "engines")
    assert str(caught.value) == (
        "tensorrt: expected an NVIDIA GPU for --target this-gpu, got none: build on the machine that will "
        "run the engines, or use --backend onnxruntime"
    )
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorrt-rtx"}, "expected the backend tensorrt, got tensorrt-rtx, whose engines are"),
        ({"builder_optimization_level": 6}, "expected 0 to 5, got 6: 3 is TensorRT's own, 5 builds longest"),
    ],
    ids=["backend", "level"],
)
def test_levels_that_do_not_exist(
    tmp_path: Path, one_block: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"^builder_optimization_level: {message}"):
        build_one_block(one_block, tmp_path / "engines", **{"builder_optimization_level": 5, **options})


@pytest.mark.slow(reason="exports graphs in bfloat16")
def test_a_build_for_this_gpu(
    sim: SimulatedTensorRTBuilder, tmp_path: Path, one_block: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_one_block(one_block, tmp_path, max_batch=2, builder_optimization_level=4)
    manifest = manifests.load(folder)
    assert manifest.complete and manifest.gpu == H100.identity
    record = segment(folder, "normal")
    assert record.fused_attentions == record.attentions == ATTENTIONS
    assert record.activation_bytes == sim.device_memory_bytes
    assert [file.name for file in record.files] == ["normal.this-gpu.engine", "normal.this-gpu.layers.json"]
    for file in record.files:
        check_file(folder / file.name, file)
    # One or two passes of one or two videos.
    assert record.facts["profiles"] == [[1, 1, 1], [2, 2, 2], [4, 4, 4]]
    assert segment(folder, "text").facts["profiles"] == [[3, 3, 3], [6, 6, 6]]
    assert record.facts["gpu"]["multiprocessors"] == 132
    assert "builder_optimization_level=4" in record.facts["flags"]
    assert [path.suffix for path in tmp_path.iterdir() if path.is_file()] == [".timings"]

    # A gate that misses on another GPU loses neither the timings nor the segment that was finished.
    place_gpu(monkeypatch, replace(H100, name="NVIDIA A100", sm="sm_80"))
    sim.name_kernel = lambda number: None if number == 0 else f"_gemm_mha_v2_myl0_{number}"
    with pytest.raises(GateMissed, match="normal: expected 2 fused attentions, got 5: an attention of this"):
        build_one_block(one_block, tmp_path, max_batch=2, builder_optimization_level=4)
    (other,) = {path.parent for path in tmp_path.glob("*/manifest.json")} - {folder}
    assert [record.segment.name for record in manifests.load(other).segments] == ["text"]

    # If no name is known, memory decides.
    sim.name_kernel = lambda number: f"new_kernel_{number}"
    sim.device_memory_bytes = 1 << 40
    with pytest.raises(GateMissed, match=r"normal: expected at most \d+ bytes of activations for \d rows"):
        build_one_block(one_block, tmp_path, max_batch=2, builder_optimization_level=4)
    sim.device_memory_bytes = 1 << 12
    assert build_one_block(one_block, tmp_path, max_batch=2, builder_optimization_level=4) == other
    assert segment(other, "normal").fused_attentions is None


def segment(folder: Path, name: str) -> SegmentRecord:
    record = manifests.load(folder).record(name)
    assert record is not None
    return record
