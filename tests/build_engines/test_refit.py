"""TensorRT engines are refitted with other weights: over a strict stand-in, and with the real builder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stg_trt import build
from stg_trt.build_engines import compile_tensorrt, graph_weights
from stg_trt.engines import manifest as manifests
from stg_trt.engines.manifest import SegmentRecord
from stg_trt.errors import BackendUnavailable, GateMissed
from stg_trt.system.gpu import Gpu
from tests.support.build_gpu import H100, place_gpu, simulated_build
from tests.support.cli import assert_one_line_error, invoke
from tests.support.family_cases import LTX
from tests.support.fine_tuned import save_fine_tuned
from tests.support.simulated_builder import SimulatedTensorRTBuilder

RTX = Gpu("NVIDIA RTX PRO 6000", "sm_120", 96 << 30, 188, "580.65.06")
SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 9, "text_length": 4, "stg_blocks": [0]}
SEGMENTS = ("text", "front", "block_0", "back")
Build = Callable[..., Path]


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> SimulatedTensorRTBuilder:
    simulated = simulated_build(monkeypatch)
    simulated.__version__ = "11.4.0.106"
    return simulated


@pytest.fixture
def other(one_block: Path, tmp_path: Path) -> Path:
    return save_fine_tuned(one_block, tmp_path / "other")


@pytest.fixture
def refittable(tmp_path: Path) -> Build:
    """Builds into one folder."""

    def build_it(checkpoint: Path, output: Path = tmp_path / "engines", **options: Any) -> Path:
        call = {"backend": "tensorrt", "verify_timesteps": 1, "refittable": True, **SIZE, **options}
        (folder,) = build(checkpoint, output, **call)
        return folder

    return build_it


def plans(folder: Path) -> dict[str, Any]:
    """Weights by hash, kernels, and the weights that can be replaced; by segment."""
    return {name: json.loads((folder / f"{name}.this-gpu.engine").read_bytes()) for name in SEGMENTS}


def reused(folder: Path) -> dict[str, tuple[str, ...]]:
    return {record.segment.name: record.reused for record in manifests.load(folder).segments}


def test_other_weights_are_put_into_a_copy_of_the_engines(
    sim: SimulatedTensorRTBuilder,
    one_block: Path,
    other: Path,
    refittable: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if compiled from them; the first build's stay as they are, and refitted ones can be refitted."""
    monkeypatch.setattr(graph_weights, "_EMBEDDED_BYTES", 0)
    first = refittable(one_block)
    before, compiled = plans(first), len(sim.configs)
    second = refittable(other)
    assert second != first and len(sim.configs) == compiled == sim.refitted == len(SEGMENTS)
    assert all("engine" in names for names in reused(second).values())
    assert not any("engine" in names for names in reused(first).values())
    fresh = refittable(other, tmp_path / "fresh")
    assert len(sim.configs) == 2 * compiled and plans(second) == plans(fresh)
    assert plans(first) == before
    assert all(plans(second)[name]["weights"] != before[name]["weights"] for name in SEGMENTS)
    record = segment(second, "block_0")
    assert record.fused_attentions == record.attentions and record.verification
    assert record.activation_bytes == sim.device_memory_bytes and not record.commands
    assert "refit_individual" in record.facts["flags"]
    # Of the refitted build alone, a third is refitted too.
    shutil.rmtree(first)
    third = refittable(save_fine_tuned(one_block, tmp_path / "third", 0.1))
    assert sim.refitted == 2 * len(SEGMENTS) and manifests.load(third).complete
    shown = " ".join(invoke("inspect", third).stdout.split())
    assert "engine refitted: text, front, block_0, back" in shown


def segment(folder: Path, name: str) -> SegmentRecord:
    record = manifests.load(folder).record(name)
    assert record is not None
    return record


def test_constants_are_not_marked(sim: SimulatedTensorRTBuilder, one_block: Path, refittable: Build) -> None:
    """Only weights of the checkpoint: TensorRT refuses those that shapes are made of."""
    for plan in plans(refittable(one_block)).values():
        constants = plan["weights"].keys() - {*plan["marked"]}
        assert plan["marked"] and all("weight" not in name.rsplit(".", 1)[-1] for name in constants)


@pytest.mark.parametrize(
    ("options", "gpu"),
    [
        ({"num_frames": 17}, H100),
        ({"max_batch": 2}, H100),
        ({"stg_mode": "stg-r"}, H100),
        ({"builder_optimization_level": 5}, H100),
        ({}, replace(H100, driver="590.10.01")),
        ({"refittable": False}, H100),
    ],
    ids=["size", "rows", "mode", "level", "driver", "not asked for"],
)
def test_engines_that_differ_in_more_than_weights_are_compiled(
    options: dict[str, Any],
    gpu: Gpu,
    sim: SimulatedTensorRTBuilder,
    one_block: Path,
    other: Path,
    refittable: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refittable(one_block)
    place_gpu(monkeypatch, gpu)
    assert "engine" not in reused(refittable(other, **options))["block_0"]


def test_engines_of_another_graph_are_compiled(
    sim: SimulatedTensorRTBuilder, one_block: Path, other: Path, refittable: Build
) -> None:
    """Whatever the key says: the structure of the graph is compared."""
    first = refittable(one_block)
    manifest = manifests.load(first)
    segments = tuple(record.model_copy(update={"structure_sha256": "0"}) for record in manifest.segments)
    manifests.save(manifest.model_copy(update={"segments": segments}), first)
    assert not any("engine" in names for names in reused(refittable(other)).values())


def test_a_damaged_engine_is_not_refitted(
    sim: SimulatedTensorRTBuilder, one_block: Path, other: Path, refittable: Build
) -> None:
    path = refittable(one_block) / "front.this-gpu.engine"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    names = reused(refittable(other))
    assert "engine" not in names["front"] and "engine" in names["back"]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("refit_from_file", "no room"),
        ("get_missing_weights", "1 weights would stay those of the other build, such as 0_"),
        ("refit_cuda_engine", "no room"),
        ("serialize_with_config", "the engine cannot be written"),
        (
            "deserialize_cuda_engine",
            "expected an engine that tensorrt 11.4.0.106 can load on this GPU, got no",
        ),
    ],
)
def test_an_engine_that_tensorrt_does_not_refit_is_compiled(
    call: str,
    reason: str,
    sim: SimulatedTensorRTBuilder,
    one_block: Path,
    other: Path,
    refittable: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refittable(one_block)
    refit = compile_tensorrt.refit_engine

    def fails(*given: Any) -> int:
        sim.failing.add(call)
        try:
            return refit(*given)
        finally:
            sim.failing.discard(call)

    sim.says = ["no room"]
    monkeypatch.setattr(compile_tensorrt, "refit_engine", fails)
    with pytest.warns(
        UserWarning, match=f"front: compiled, since the engine of .* is not refitted: .*{reason}"
    ):
        folder = refittable(other)
    assert sim.refitted == (len(SEGMENTS) if call == "serialize_with_config" else 0)
    assert not any("engine" in names for names in reused(folder).values())
    assert plans(folder) == plans(refittable(other, tmp_path / "fresh"))


def test_an_engine_that_loses_a_weight_misses_a_gate(
    sim: SimulatedTensorRTBuilder, one_block: Path, refittable: Build, tmp_path: Path
) -> None:
    """As those of TensorRT 11.3 lose biases."""
    refittable(one_block)
    sim.lost = {"0_text/projection.linear_1.bias"}
    with pytest.raises(
        GateMissed, match=r"^text: expected \d weights that can be refitted, got an engine wi"
    ):
        refittable(one_block, tmp_path / "lossy")


@pytest.mark.parametrize("version", ["11.3.0.102", "11.3.1.5"])
def test_tensorrt_11_3_is_refused(
    version: str, sim: SimulatedTensorRTBuilder, one_block: Path, refittable: Build, tmp_path: Path
) -> None:
    sim.__version__ = version
    with pytest.raises(BackendUnavailable) as refused:
        refittable(one_block)
    assert str(refused.value) == (
        "refittable: expected a TensorRT other than 11.3, whose engines lose biases if they can be refitted, "
        f"got {version}: pip install --upgrade 'stg-trt[tensorrt]', or leave --refittable out"
    )
    assert not (tmp_path / "engines").exists()
    refittable(one_block, refittable=False)


@pytest.mark.parametrize(("gpu", "got"), [(None, "none"), (H100, "sm_90")], ids=["none", "another"])
def test_tensorrt_rtx_needs_the_gpu_of_its_target(
    gpu: Gpu | None,
    got: str,
    sim: SimulatedTensorRTBuilder,
    one_block: Path,
    refittable: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place_gpu(monkeypatch, gpu)
    options = {"backend": "tensorrt-rtx", "target": "sm_120"}
    with pytest.raises(BackendUnavailable) as refused:
        refittable(one_block, **options)
    assert str(refused.value) == (
        f"refittable: expected a GPU of sm_120 to build with tensorrt-rtx on, got {got}: build on that GPU, "
        "or leave --refittable out"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--backend=onnxruntime",),
            r"expected the backend tensorrt or tensorrt-rtx, got onnxruntime, which co",
        ),
        (
            ("--backend=inductor", "--target=cpu"),
            r"expected the backend tensorrt or tensorrt-rtx, got inductor",
        ),
        (
            ("--backend=tensorrt-rtx", "--precision=fp8"),
            r"expected bf16, got fp8, whose scales decide the graph: use --precision bf16, or leave it out",
        ),
    ],
    ids=["onnxruntime", "inductor", "fp8"],
)
def test_where_it_changes_nothing_or_cannot_be(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in LTX.sizes.items()]
    command: tuple[str | Path, ...] = (
        "build",
        LTX.goldens,
        "--output",
        tmp_path / "engines",
        *sizes,
        *options,
        "--refittable",
    )
    assert_one_line_error(invoke(*command), f"refittable: {message}")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow(reason="compiles an engine with TensorRT-RTX")
def test_the_real_builder_marks_all_weights_and_needs_a_gpu(
    one_block: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why it is refused without one; every weight of the checkpoint can be marked, before that."""
    pytest.importorskip("tensorrt_rtx", reason="needs the wheel of TensorRT-RTX")
    if compile_tensorrt.find_gpu() is not None:
        pytest.skip("TensorRT-RTX could build it on this GPU")
    monkeypatch.setattr(compile_tensorrt, "find_gpu", lambda: RTX)
    with pytest.raises(GateMissed, match=r"cannot compile it: .*CHECK\(status == CUDA_SUCCESS\) failed"):
        options: dict[str, Any] = {"backend": "tensorrt-rtx", "target": "sm_120", "refittable": True}
        build(one_block, tmp_path / "engines", **SIZE, **options, verify_timesteps=0)
