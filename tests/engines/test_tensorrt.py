"""The TensorRT session, the step graph and the sampler's loop, over a strict stand-in for the library."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stg_trt import VideoPipeline
from stg_trt.engines import manifest as manifests
from stg_trt.engines import tensorrt
from stg_trt.engines.store import Build, EngineStore
from stg_trt.errors import BackendUnavailable, EngineRejected, OutOfDeviceMemory
from stg_trt.models.segment import LAYOUTS
from stg_trt.runtime.device import Cpu
from stg_trt.system.gpu import Gpu, Machine
from tests.support.family_cases import CASES, LTX, FamilyCase
from tests.support.golden_calls import GOLDENS, arguments, every_step, joined
from tests.support.simulated_cuda import RuleBroken, SimulatedCuda
from tests.support.simulated_tensorrt import ALIGNMENT, SimulatedTensorRT, SimulatedTensorRTRtx
from tests.support.static_profiles import static_profiles

MAX_ROWS = 6
H100 = Gpu("NVIDIA H100", "sm_90", 80 << 30, 132, "580.65")


@pytest.fixture(scope="module")
def engines_of(
    tmp_path_factory: pytest.TempPathFactory, golden_engines: Callable[[FamilyCase], Path]
) -> Callable[[FamilyCase], Path]:
    """The ONNX Runtime engines of a family under manifests that say TensorRT."""

    made: dict[str, Path] = {}

    def engines(case: FamilyCase) -> Path:
        if str(case) not in made:
            root = made[str(case)] = tmp_path_factory.mktemp(f"{case}-tensorrt-engines")
            for build in EngineStore.open(golden_engines(case)).builds:
                folder = root / build.folder.name
                shutil.copytree(build.folder, folder)
                renamed = build.manifest.model_copy(update={"backend": "tensorrt", "target": "this-gpu"})
                manifests.save(renamed, folder)
        return made[str(case)]

    return engines


@pytest.fixture(scope="module")
def engines(engines_of: Callable[[FamilyCase], Path]) -> Path:
    """Those of LTX-Video."""
    return engines_of(LTX)


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> SimulatedTensorRT:
    simulated = SimulatedTensorRT(*((rows, rows) for rows in range(1, MAX_ROWS + 1)))
    replace_library(monkeypatch, simulated)
    return simulated


def replace_library(monkeypatch: pytest.MonkeyPatch, simulated: SimulatedTensorRT) -> None:
    monkeypatch.setattr(tensorrt, "load_library", lambda backend: simulated)
    monkeypatch.setattr(tensorrt, "_ALIGNMENT_BYTES", ALIGNMENT)
    monkeypatch.setattr(tensorrt.TensorRTEngine, "alignment", ALIGNMENT)


@pytest.fixture
def device(sim: SimulatedTensorRT, monkeypatch: pytest.MonkeyPatch) -> SimulatedCuda:
    simulated = SimulatedCuda(sim)
    replace_gpu(monkeypatch, simulated)
    return simulated


def replace_gpu(monkeypatch: pytest.MonkeyPatch, simulated: SimulatedCuda) -> None:
    monkeypatch.setattr("stg_trt.runtime.samplers.open_device", lambda name: simulated)
    monkeypatch.setattr("stg_trt.runtime.pipeline.this_machine", lambda: Machine(H100))


def context(sim: SimulatedTensorRT, engines: Path, name: str = "text") -> tensorrt.TensorRTContext:
    build = EngineStore.open(engines).builds[0]
    path = build.folder / f"{name}.onnx"
    return tensorrt.load_all("tensorrt", {name: [path]}, torch.device("cpu"))[name].context()


def text_tensors(rows: int) -> dict[str, Tensor]:
    return {"prompt_embeds": torch.randn(rows, 9, 24), "text": torch.zeros(rows, 9, 32)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "golden"), GOLDENS, ids=str)
def test_goldens_through_captured_graphs(
    device: SimulatedCuda,
    engines_of: Callable[[FamilyCase], Path],
    case: FamilyCase,
    golden: str,
    layout: str,
) -> None:
    pipeline = VideoPipeline.from_pretrained(case.goldens, engines=engines_of(case), layout=layout)
    expected = load_file(case.goldens / f"{golden}.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = every_step(pipeline, **arguments(golden, case.goldens))
    for i, latents in enumerate(steps):
        assert (latents - expected[f"expected_step_{i:02d}"]).abs().max() <= 1e-4, f"step {i}"
    # Steps that use the predictions before them are another graph than the first.
    assert len(device.graphs) <= 2
    # One replay of each is the check against the plain run.
    assert sum(graph.replays for graph in device.graphs) == len(steps) + len(device.graphs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_goldens_with_the_profiles_of_a_build(
    sim: SimulatedTensorRT,
    device: SimulatedCuda,
    engines_of: Callable[[FamilyCase], Path],
    case: FamilyCase,
    layout: str,
) -> None:
    """Static ones, for the numbers of rows of each segment alone: of one video, and of two at once."""
    for build in EngineStore.open(engines_of(case)).builds:
        sim.profiles_by_plan |= static_profiles(case, build)
    pipeline = VideoPipeline.from_pretrained(case.goldens, engines=engines_of(case), layout=layout)
    for golden in case.golden_names:
        call = arguments(golden, case.goldens)
        expected = load_file(case.goldens / f"{golden}.safetensors")["expected_latents"]
        assert (pipeline(**call).frames - expected).abs().max() <= 1e-4, golden
        if "generator" in call:
            continue
        assert (pipeline(**joined(call, call)).frames - expected).abs().max() <= 1e-4, f"{golden}, two videos"


def test_one_graph_per_guidance_state(device: SimulatedCuda, engines: Path, ltx_checkpoint: Path) -> None:
    pipeline = VideoPipeline.from_pretrained(ltx_checkpoint, engines=engines, layout="segmented")
    call = arguments("stg_r", ltx_checkpoint)
    call |= {"stg_scale": [0.0, 1.0, 1.0, 2.0, 0.0, 0.0], "guidance_scale": [3.0, 3.0, 1.0, 1.0, 1.0, 3.0]}
    first = pipeline(**call).frames
    states = {"cfg", "cfg+stg", "stg", "cond"}
    assert len(device.graphs) == len(states)
    assert torch.equal(pipeline(**call).frames, first)
    assert len(device.graphs) == len(states)


@pytest.mark.parametrize("count", range(1, 6))
def test_as_many_skip_passes_as_were_built(
    sim: SimulatedTensorRT,
    device: SimulatedCuda,
    engines: Path,
    ltx_engines: Path,
    ltx_checkpoint: Path,
    tmp_path: Path,
    count: int,
) -> None:
    """Against ONNX Runtime, which takes any number; one pass more is refused."""
    blocks = {f"skip_{i}": ((1, 3), (3,), (1,))[i % 3] for i in range(count)}
    scales = {name: 0.3 + 0.2 * i for i, name in enumerate(blocks)}
    for build in EngineStore.open(engines).builds:
        shutil.copytree(build.folder, tmp_path / build.folder.name)
        named = build.manifest.model_copy(update={"skip_passes": blocks})
        manifests.save(named, tmp_path / build.folder.name)
        if named.layout == "segmented":
            sim.profiles_by_plan |= static_profiles(LTX, Build(tmp_path / build.folder.name, named))
    call = arguments("stg_a_rescale", ltx_checkpoint) | {"stg_blocks": blocks, "stg_scale": scales}
    pipeline = VideoPipeline.from_pretrained(ltx_checkpoint, engines=tmp_path, layout="segmented")
    frames = pipeline(**call).frames
    assert len(device.graphs) == 1
    onnx = VideoPipeline.from_pretrained(ltx_checkpoint, engines=ltx_engines, backend="onnxruntime")
    onnx._samplers._devices["cpu"] = Cpu()
    assert (onnx(**call).frames - frames).abs().max() <= 1e-5
    more = {"stg_blocks": blocks | {"more": (1,)}, "stg_scale": scales | {"more": 1.0}}
    with pytest.raises(EngineRejected, match=f"built for {count} skip passes, the request has {count + 1}"):
        pipeline(**call | more)


def test_two_pipelines_do_not_disturb_each_other(
    device: SimulatedCuda, engines: Path, ltx_checkpoint: Path
) -> None:
    one, other = (VideoPipeline.from_pretrained(ltx_checkpoint, engines=engines) for _ in range(2))
    call = arguments("stg_r", ltx_checkpoint)
    expected = one(**call).frames
    other(**arguments("cfg", ltx_checkpoint))
    assert torch.equal(one(**call).frames, expected)


def test_cancelled_and_run_again(device: SimulatedCuda, engines: Path, ltx_checkpoint: Path) -> None:
    pipeline = VideoPipeline.from_pretrained(ltx_checkpoint, engines=engines)
    call = arguments("stg_r", ltx_checkpoint)
    expected = pipeline(**call).frames

    def cancel(pipe: Any, index: int, timestep: float, tensors: dict[str, Tensor]) -> None:
        pipe.interrupt = index == 2

    assert not torch.equal(pipeline(**call, callback_on_step_end=cancel).frames, expected)
    assert torch.equal(pipeline(**call).frames, expected)


def test_failed_capture_falls_back_aloud(
    sim: SimulatedTensorRT, device: SimulatedCuda, engines: Path, ltx_checkpoint: Path
) -> None:
    sim.failing.add("capture")
    pipeline = VideoPipeline.from_pretrained(ltx_checkpoint, engines=engines)
    with pytest.warns(UserWarning, match="capture was made to fail"):
        frames = pipeline(**arguments("cfg", ltx_checkpoint)).frames
    expected = load_file(ltx_checkpoint / "cfg.safetensors")["expected_latents"]
    assert (frames - expected).abs().max() <= 1e-4
    assert device.graphs == []


def test_no_room_on_the_gpu(
    device: SimulatedCuda, engines: Path, ltx_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*size: Any, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    pipeline = VideoPipeline.from_pretrained(ltx_checkpoint, engines=engines)
    call = arguments("cfg", ltx_checkpoint)
    with monkeypatch.context() as patch, pytest.raises(OutOfDeviceMemory) as caught:
        patch.setattr("stg_trt.runtime.sampler.StepBuffers", full)
        pipeline(**call)
    assert re.fullmatch(
        r"GPU memory: expected room for engines of 0\.0 GiB, .* .160x128x17, segmented., got CUDA out of "
        r"memory. Tried to allocate 9.00 GiB. use fewer frames, .*the segmented layout, or --offload",
        str(caught.value),
    )
    expected = load_file(ltx_checkpoint / "cfg.safetensors")["expected_latents"]
    assert (pipeline(**call).frames - expected).abs().max() <= 1e-4


@pytest.mark.slow(reason="generates many times")
def test_many_generations_do_not_grow(
    sim: SimulatedTensorRT, device: SimulatedCuda, engines: Path, ltx_checkpoint: Path
) -> None:
    pipeline = VideoPipeline.from_pretrained(ltx_checkpoint, engines=engines)
    call = arguments("stg_r", ltx_checkpoint) | {"num_inference_steps": 2}
    pipeline(**call)
    sampler = next(iter(pipeline._samplers._samplers.values()))
    bound, state = dict(sampler._bound), sampler._state
    for _ in range(40):
        pipeline(**call)
    assert sampler._bound == bound and sampler._state is state
    assert len(device.graphs) == 1


@pytest.mark.slow(reason="opens the engines five times")
def test_rtx_keeps_what_it_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ltx_checkpoint: Path, engines: Path
) -> None:
    root = Path(shutil.copytree(engines, tmp_path / "engines"))

    def run(gpu: str) -> tuple[int, Tensor]:
        sim = SimulatedTensorRTRtx((1, MAX_ROWS), gpu=gpu)
        replace_library(monkeypatch, sim)
        device = SimulatedCuda(sim)
        replace_gpu(monkeypatch, device)
        pipeline = VideoPipeline.from_pretrained(ltx_checkpoint, engines=root)
        frames = pipeline(**arguments("stg_r", ltx_checkpoint)).frames
        assert len(device.graphs) == 1
        return sim.compilations, frames

    first, expected = run("a")
    assert first > 0
    again, frames = run("a")
    assert again == 0 and torch.equal(frames, expected)
    # Kernels of another GPU are refused, compiled anew and then kept instead.
    assert run("b")[0] == first
    assert run("b")[0] == 0
    for path in root.rglob("*.kernels"):
        path.write_bytes(b"damaged")
    assert run("b")[0] == first


def test_rtx_runs_from_a_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, ltx_checkpoint: Path, engines: Path
) -> None:
    sim = SimulatedTensorRTRtx((1, MAX_ROWS))
    replace_library(monkeypatch, sim)
    replace_gpu(monkeypatch, SimulatedCuda(sim))

    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(tensorrt, "write_atomically", refuse)
    pipeline = VideoPipeline.from_pretrained(ltx_checkpoint, engines=engines)
    with pytest.warns(UserWarning, match=r"kernels: compiled kernels cannot be kept .Permission denied."):
        pipeline(**arguments("cfg", ltx_checkpoint))


def test_runs_what_was_bound(sim: SimulatedTensorRT, engines: Path) -> None:
    bound, tensors = context(sim, engines), text_tensors(2)
    for name, tensor in tensors.items():
        bound.bind(name, tensor)
    bound.enqueue(1)
    assert tensors["text"].abs().sum() > 0


def test_default_stream_is_refused(sim: SimulatedTensorRT, engines: Path) -> None:
    bound = context(sim, engines)
    for name, tensor in text_tensors(2).items():
        bound.bind(name, tensor)
    with pytest.raises(RuleBroken, match="default stream"):
        bound.enqueue(0)


def test_everything_must_be_bound(sim: SimulatedTensorRT, engines: Path) -> None:
    bound = context(sim, engines)
    bound.bind("prompt_embeds", text_tensors(2)["prompt_embeds"])
    with pytest.raises(AssertionError, match="text"):
        bound.enqueue(1)


def test_rows_outside_the_profile(sim: SimulatedTensorRT, engines: Path) -> None:
    with pytest.raises(EngineRejected, match=r"of shape 1x9x24 or .* 6x9x24, got 7x9x24: rebuild"):
        context(sim, engines).bind("prompt_embeds", text_tensors(7)["prompt_embeds"])


def test_dtype_of_a_bound_tensor(sim: SimulatedTensorRT, engines: Path) -> None:
    with pytest.raises(EngineRejected, match=r"expected text as torch.float32, got torch.float16"):
        context(sim, engines).bind("text", text_tensors(2)["text"].half())


def test_unaligned_address(sim: SimulatedTensorRT, engines: Path) -> None:
    memory = torch.zeros(2 * 9 * 32 + 1)[1:].view(2, 9, 32)
    with pytest.raises(AssertionError, match="text"):
        context(sim, engines).bind("text", memory)


def test_capture_needs_a_warm_up(sim: SimulatedTensorRT, engines: Path) -> None:
    bound, device = context(sim, engines), SimulatedCuda(sim)
    for name, tensor in text_tensors(2).items():
        bound.bind(name, tensor)
    bound.enqueue(1)
    with pytest.raises(RuleBroken, match="warm-up"):
        device.capture(lambda: bound.enqueue(1))


def test_one_context_per_graph(sim: SimulatedTensorRT, engines: Path) -> None:
    bound, device = context(sim, engines), SimulatedCuda(sim)
    tensors = text_tensors(2)
    for name, tensor in tensors.items():
        bound.bind(name, tensor)
    bound.enqueue(1)
    bound.enqueue(1)
    device.capture(lambda: bound.enqueue(1))
    with pytest.raises(RuleBroken, match="one live graph"):
        device.capture(lambda: bound.enqueue(1))
    with pytest.raises(RuleBroken, match="captured context was changed"):
        bound.bind("text", tensors["text"])
        bound.enqueue(1)


def test_a_capture_reads_nothing_on_the_host(sim: SimulatedTensorRT) -> None:
    with pytest.raises(RuleBroken, match="on the host"):
        SimulatedCuda(sim).capture(lambda: print(torch.ones(1).item()))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("Runtime", BackendUnavailable, "expected a GPU that it can use, got .*nullptr: check the GPU"),
        ("deserialize_cuda_engine", EngineRejected, "can load on this GPU, got no reason: build the engines"),
        ("create_execution_context", EngineRejected, "free GPU memory"),
        ("set_optimization_profile_async", EngineRejected, "set_optimization_profile_async failed"),
        ("set_input_shape", EngineRejected, "set_input_shape failed"),
        ("set_tensor_address", EngineRejected, "set_tensor_address failed"),
        ("execute_async_v3", RuntimeError, "execute_async_v3 failed"),
    ],
)
def test_every_failing_call_is_noticed(
    sim: SimulatedTensorRT, engines: Path, call: str, error: type[Exception], message: str
) -> None:
    sim.failing.add(call)
    with pytest.raises(error, match=message):
        bound = context(sim, engines)
        for name, tensor in text_tensors(2).items():
            bound.bind(name, tensor)
        bound.enqueue(1)
