"""The captured step over eager engines, on a strict stand-in for a GPU."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import FlowMatchLCMScheduler

from stg_trt.engines.engine import Context, Engine
from stg_trt.models.perturbation import MODES
from stg_trt.runtime.device import Cpu, Cuda, node_counter
from stg_trt.runtime.graph import StepGraph, _Outcome
from stg_trt.runtime.sampler import SampledStep
from tests.support.eager_sampler import STEPS, assert_same, run, sampler_on, steps_of
from tests.support.family_cases import FamilyCase
from tests.support.simulated_cuda import RuleBroken, SimulatedCuda, SimulatedGpu, SimulatedGraph

SEGMENTS = ("front", "block_1", "mid_2_2", "block_3", "back")
# Block 1 takes the skip rows from a copy of cond's, block 3 is passed by.
STG_R: dict[str, Any] = {"stg_scale": 1.0, "stg_blocks": [1, 3], "stg_mode": "stg-r"}
ONE_STEP = (
    *("fan_out", "front", "copy_rows", "block_1", "copy_rows", "mid_2_2", "block_3", "copy_rows", "back"),
    "guided_step",
)


@pytest.fixture
def gpu() -> SimulatedGpu:
    return SimulatedGpu()


@pytest.fixture
def device(gpu: SimulatedGpu) -> SimulatedCuda:
    return SimulatedCuda(gpu)


@pytest.mark.parametrize("mode", MODES)
def test_a_captured_run_is_the_plain_one(device: SimulatedCuda, case: FamilyCase, mode: str) -> None:
    scales = {**STG_R, "stg_mode": mode}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "CUDA graph")
        captured = run(sampler_on(device, case), case, **scales)
    assert_same(captured, run(sampler_on(Cpu(), case), case, **scales))
    assert [graph.replays for graph in device.graphs] == [1 + STEPS]


def test_a_captured_run_adds_the_noise_of_its_solver(device: SimulatedCuda) -> None:
    """Twice over the same memory: the second run draws the same noise."""
    sampler = sampler_on(device)
    captured = [run(sampler, scheduler=FlowMatchLCMScheduler(), **STG_R) for _ in range(2)]
    plain = run(sampler_on(Cpu()), scheduler=FlowMatchLCMScheduler(), **STG_R)
    assert_same(captured[0], plain)
    assert_same(captured[1], plain)
    # The last step adds no noise, so it needs no history and is a graph of its own.
    assert [graph.replays for graph in device.graphs] == [1 + 2 * (STEPS - 1), 1 + 2]
    assert not torch.equal(plain[-1], run(sampler_on(Cpu()), **STG_R)[-1])


@pytest.mark.parametrize("lost", [SEGMENTS, *((name,) for name in sorted({*ONE_STEP}))], ids="+".join)
def test_a_graph_that_lacks_work_is_refused(device: SimulatedCuda, lost: tuple[str, ...]) -> None:
    device.lost = {*lost}
    with pytest.warns(UserWarning, match=r"expected the replay to equal the plain run, got a difference of "):
        got = run(sampler_on(device), **STG_R)
    assert_same(got, run(sampler_on(Cpu()), **STG_R))


def test_a_graph_without_nodes_is_refused(device: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "named", lambda name, operation: operation)
    with pytest.warns(UserWarning, match="expected work in the graph, got no nodes"):
        got = run(sampler_on(device))
    assert_same(got, run(sampler_on(Cpu())))


def test_a_capture_that_fails_is_the_last(gpu: SimulatedGpu, device: SimulatedCuda) -> None:
    gpu.failing.add("capture")
    sampler = sampler_on(device)
    scales = {**STG_R, "stg_range": (1, 3)}
    with pytest.warns(UserWarning, match=r"capture failed .CUDA error: capture was made to fail.,") as said:
        got = run(sampler, **scales)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    device.empty_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(sampler, guidance_scale=1.0)
    assert device.attempts == 1 and device.graphs == []
    assert_same(got, run(sampler_on(Cpu()), **scales))


def test_the_stand_in_punishes_what_a_gpu_would(gpu: SimulatedGpu, device: SimulatedCuda) -> None:
    gpu.failing.add("capture")
    with pytest.raises(RuntimeError, match="made to fail"):
        device.capture(lambda: None)
    for call in (device.empty_cache, lambda: device.capture(lambda: None)):
        with pytest.raises(RuleBroken, match="captures_underway"):
            call()


def test_replay_and_plain_run_are_compared_in_all_that_a_step_leaves() -> None:
    pred, change, counter = torch.randn(3, 4, 5), 1e-3 * torch.randn(1, 4, 5), torch.tensor([1])
    plain = _Outcome((pred, change), counter)
    assert _Outcome((pred, change), counter).distance(plain) == 0
    assert _Outcome((pred * 1.01, change), counter).distance(plain) == pytest.approx(0.01, rel=1e-3)
    assert _Outcome((pred, change * 1.01), counter).distance(plain) == pytest.approx(0.01, rel=1e-3)
    small = pred * torch.tensor([1.0, 1e-3, 1.0])[:, None, None]
    off = small * torch.tensor([1.0, 1.5, 1.0])[:, None, None]
    assert _Outcome((off, change), counter).distance(_Outcome((small, change), counter)) == pytest.approx(0.5)
    assert _Outcome((pred, change), counter + 1).distance(plain) == math.inf
    lost = pred.clone()
    lost[1, 2, 3] = math.nan
    assert math.isnan(_Outcome((lost, change), counter).distance(plain))


@torch.no_grad()
def test_every_state_of_a_run_is_captured_before_its_first_step(
    device: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, captured_at, capture = sampler_on(device), [], device.capture

    def noted(work: Callable[[], None]) -> SimulatedGraph:
        assert sampler._state is not None
        captured_at.append(int(sampler._state.video.table.counter))
        return capture(work)

    monkeypatch.setattr(device, "capture", noted)
    scales: dict[str, Any] = {
        "guidance_scale": [3.0, 3.0, 1.0, 1.0, 5.0],
        "stg_scale": [0.0, 1.0, 1.0, 2.0, 0.0],
        "stg_blocks": [[], [1], [1], [1, 3], []],
        "stg_mode": "stg-a",
        "rescale": [0.0, 0.7, 0.0, 0.0, 0.0],
    }
    steps = steps_of(sampler, **scales)
    first: SampledStep = next(steps)
    # CFG, CFG + STG with rescale, STG of one block and of two; each on the values of a step of its own.
    assert len(device.graphs) == 4 and captured_at == [0, 1, 2, 3]
    latents = [first.latents, *(step.latents for step in steps)]
    assert len(device.graphs) == 4
    assert_same(latents, run(sampler_on(Cpu()), **scales))


def test_the_timeline_of_a_plain_and_of_a_captured_step(device: SimulatedCuda) -> None:
    run(sampler_on(device), **STG_R)
    # Two warm-up runs, the capture, the replay that is checked; then every step is one range.
    replay = "replay uncond+cond+skip"
    assert device.timeline == [*ONE_STEP * 4, *[replay, *ONE_STEP] * STEPS]


def test_the_cpu_adds_nothing_to_an_operation() -> None:
    def operation(stream: int) -> None:
        assert stream == 0

    assert Cpu().named("front", operation) is operation


def test_without_cuda_bindings_nodes_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    node_counter.cache_clear()
    with pytest.warns(UserWarning, match=r"expected the package cuda-bindings, got .*: pip install") as said:
        count = node_counter()
        assert node_counter() is count
    node_counter.cache_clear()
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert count(cast(Any, None)) is None


def test_a_graph_of_unknown_nodes_is_used(device: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = device.capture

    def uncounted(work: Any) -> Any:
        graph = capture(work)
        graph.nodes = None
        return graph

    monkeypatch.setattr(device, "capture", uncounted)
    run(sampler_on(device))
    assert device.graphs[0].replays == 1 + STEPS


class Allocator:
    """torch's allocator and default generator as far as a failed capture concerns them."""

    def __init__(self, recording: bool) -> None:
        self.recording = recording
        self.calls: list[str] = []

    def replace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = SimpleNamespace(
            clone_state=lambda: "clean", graphsafe_set_state=lambda state: self.calls.append(state)
        )
        monkeypatch.setattr(torch.cuda, "default_generators", [generator])
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 2))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    def end(self, index: int, pool: tuple[int, int]) -> None:
        if not self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording = False
        self.calls.append(f"end {index} {pool}")

    def release(self, index: int, pool: tuple[int, int]) -> None:
        self.calls.append(f"release {index} {pool}")


@pytest.mark.parametrize("recording", [True, False], ids=["torch 2.11", "torch 2.12"])
def test_the_pool_of_a_failed_capture_is_ended(monkeypatch: pytest.MonkeyPatch, recording: bool) -> None:
    monkeypatch.setattr(Cuda, "captures", True)
    allocator = Allocator(recording)
    allocator.replace(monkeypatch)
    cuda = Cuda.__new__(Cuda)
    cuda.torch_device, cuda._pool = torch.device("cuda", 0), cast(Any, (0, 1))
    cuda.stop_capturing()
    ended = ["end 0 (0, 1)", "release 0 (0, 1)"] if recording else []
    assert allocator.calls == ["clean", *ended] and not allocator.recording
    assert cuda._pool == (0, 2)
    # No other device of the process captures either.
    assert not Cuda.captures and not Cuda.__new__(Cuda).captures


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A GPU of a process in which no capture has failed, as far as the tests after this one know."""
    monkeypatch.setattr(Cuda, "captures", True)
    return Cuda()


@pytest.mark.gpu
def test_a_gpu_captures_every_state_of_a_run(cuda: Cuda, recwarn: pytest.WarningsRecorder) -> None:
    scales = {**STG_R, "stg_range": (1, 3), "rescale": 0.7, "cfg_zero_star": True}
    sampler = sampler_on(cuda)
    got = run(sampler, **scales)
    assert not [said for said in recwarn.list if "CUDA graph" in str(said.message)]
    assert all(isinstance(step, StepGraph) and step._graph for step in sampler._bound.values())
    assert len(sampler._bound) == 2
    for ours, expected in zip(got, run(sampler_on(Cpu()), **scales), strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_gpu_goes_on_after_a_failed_capture(cuda: Cuda) -> None:
    x = torch.ones(1 << 20, device="cuda")
    with cuda.scope(), pytest.raises(RuntimeError):
        cuda.capture(lambda: print((x * 2).sum().item()))
    cuda.stop_capturing()
    with cuda.scope():
        total = (x * 2).sum()
    assert float(total) == 2 << 20
    torch.cuda.empty_cache()
    assert torch.randn(4, device="cuda").isfinite().all()
    # Someone else's capture in the same process.
    graph, y = torch.cuda.CUDAGraph(), torch.ones(4, device="cuda")
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        y.add_(1)
    graph.replay()
    assert float(y.sum()) == 8


class ReadsOnTheHost:
    """An engine that waits for its prediction, which no capture allows."""

    alignment = 1

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def context(self) -> Context:
        return ReadingContext(self.engine.context())


class ReadingContext:
    """One binding of it."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.bind = context.bind
        self.x = torch.ones(4, device="cuda")

    def enqueue(self, stream: int) -> None:
        self.context.enqueue(stream)
        assert self.x.sum().item() == 4


@pytest.mark.gpu
def test_a_gpu_runs_steps_that_cannot_be_captured(cuda: Cuda) -> None:
    sampler = sampler_on(cuda)
    sampler._engines = {**sampler._engines, "back": ReadsOnTheHost(sampler._engines["back"])}
    with pytest.warns(UserWarning, match="capture failed .*, all steps of this process run without one"):
        got = run(sampler, **STG_R)
    torch.cuda.empty_cache()
    for ours, expected in zip(got, run(sampler_on(Cpu()), **STG_R), strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-3, atol=1e-3)
