"""The passes of a step on several ranks: the results of one, for every family, and a rank that is lost."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from safetensors.torch import load_file
from torch import Tensor

from stg_trt import VideoPipeline
from stg_trt.errors import BackendUnavailable, InvalidRequest, RankLost
from stg_trt.runtime.device import Cpu, Device
from stg_trt.runtime.rank_messages import Message
from stg_trt.runtime.ranks import Ranks, RunningRanks, _check_gpus
from tests.conftest import OnTwoRanks
from tests.support.cli import invoke
from tests.support.eager_sampler import assert_same, run, sampler_on
from tests.support.family_cases import CASES, LTX, FamilyCase
from tests.support.golden_calls import arguments
from tests.support.rank_threads import on_ranks
from tests.support.simulated_cuda import SimulatedCuda, SimulatedGpu

STG: dict[str, Any] = {"stg_scale": 1.0, "stg_blocks": [1]}
GUIDED: dict[str, dict[str, Any]] = {
    "cfg": {},
    "stg-a": STG,
    "stg-r": STG | {"stg_mode": "stg-r"},
    "no cfg": STG | {"guidance_scale": 1.0},
    "no cfg, stg-r": STG | {"guidance_scale": 1.0, "stg_mode": "stg-r"},
    "both blocks, rescale": {"stg_scale": 1.0, "stg_blocks": [1, 3], "rescale": 0.7},
    "zero star": STG | {"cfg_zero_star": True},
    "other passes every step": STG | {"guidance_scale": [1, 3, 3, 1, 1], "stg_scale": [0, 0, 1, 1, 0]},
}  # fmt: skip


@pytest.fixture
def golden(golden_engines: Callable[[FamilyCase], Path]) -> VideoPipeline:
    return VideoPipeline.from_pretrained(LTX.goldens, golden_engines(LTX), layout="segmented")


def latents_of(pipeline: VideoPipeline, **call: Any) -> Tensor:
    frames = pipeline(**call).frames
    assert isinstance(frames, Tensor)
    return frames


def distance(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((got - expected).abs().max() / expected.abs().max())


def worker_of(pipeline: VideoPipeline) -> psutil.Process:
    """The process of rank 1."""
    ranks = pipeline._samplers._ranks
    assert ranks is not None and ranks._running is not None
    return psutil.Process(ranks._running._processes[0].process.pid)


@pytest.mark.parametrize("scales", GUIDED.values(), ids=GUIDED)
def test_every_guidance_is_that_of_one_rank(tmp_path: Path, scales: dict[str, Any]) -> None:
    alone = run(sampler_on(Cpu()), **scales)
    for steps in on_ranks(tmp_path, [sampler_on(Cpu()), sampler_on(Cpu())], lambda one: run(one, **scales)):
        assert_same(steps, alone)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_family_skips_a_pass_without_cond(tmp_path: Path, case: FamilyCase, ranks: int) -> None:
    """Three ranks have a pass each; so have two without CFG."""
    scales = STG | ({"guidance_scale": 1.0} if ranks == 2 else {})
    alone = run(sampler_on(Cpu(), case), case, **scales)
    samplers = [sampler_on(Cpu(), case) for _ in range(ranks)]
    first, *others = on_ranks(tmp_path, samplers, lambda one: run(one, case, **scales))
    # Products of fewer rows may round otherwise, but the ranks do not differ among themselves.
    assert all(distance(step, wanted) <= 1e-5 for step, wanted in zip(first, alone, strict=True))
    for steps in others:
        assert_same(steps, first)


@pytest.mark.slow(reason="starts a rank in a process of its own")
def test_ranks_load_engines_before_the_steps(golden: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first one does, which waits for them; once for all calls."""
    two = VideoPipeline(golden.checkpoint, golden.store, layout="segmented", guidance_parallel=2)
    told: list[str] = []
    tell, wait = RunningRanks.tell, RunningRanks.wait

    def waited(ranks: RunningRanks, seconds: float | None = None) -> bool:
        told.extend(["wait"] if seconds is None else [])
        return wait(ranks, seconds)

    def counted(ranks: RunningRanks, message: Message) -> None:
        told.append(type(message).__name__)
        tell(ranks, message)

    monkeypatch.setattr(RunningRanks, "wait", waited)
    monkeypatch.setattr(RunningRanks, "tell", counted)
    call = arguments("stg_a_rescale", LTX.goldens)
    stages = [two(**call).stages for _ in range(2)]
    steps = (len(told) - 4) // 2
    assert told == ["Load", "wait", *["Begin", *["Next"] * steps] * 2] and steps > 1
    assert stages[0]["load"] > 0 and "load" not in stages[1]


def test_each_rank_runs_its_rows_alone(tmp_path: Path) -> None:
    samplers = [sampler_on(Cpu()), sampler_on(Cpu())]
    on_ranks(tmp_path, samplers, lambda one: run(one, **STG))
    plans = [step.plan for sampler in samplers for step in sampler._bound.values()]
    rows = [{run.segment.name: len(run.passes) for run in plan.runs} for plan in plans]
    whole = {"front": 1, "block_1": 1, "mid_2_2": 1, "block_3": 1, "back": 1}
    assert rows == [whole, whole | {"block_1": 2, "mid_2_2": 2, "block_3": 2, "back": 2}]


def test_ranks_add_the_same_noise(tmp_path: Path) -> None:
    alone = run(sampler_on(Cpu()), scheduler=FlowMatchLCMScheduler(), **STG)

    def noisy(sampler: Any) -> list[Tensor]:
        return run(sampler, scheduler=FlowMatchLCMScheduler(), **STG)

    for steps in on_ranks(tmp_path, [sampler_on(Cpu()), sampler_on(Cpu())], noisy):
        assert_same(steps, alone)


def test_captured_steps_exchange_too(tmp_path: Path) -> None:
    devices = [SimulatedCuda(SimulatedGpu()) for _ in range(2)]
    samplers = [sampler_on(cast(Device, device)) for device in devices]
    for steps in on_ranks(tmp_path, samplers, lambda one: run(one, **STG)):
        assert_same(steps, run(sampler_on(Cpu()), **STG))
    assert [len(device.graphs) for device in devices] == [1, 1]


def test_a_rank_that_cannot_capture_keeps_the_others_from_it(tmp_path: Path) -> None:
    """Else they would wait for exchanges that it does not take part in."""
    devices = [SimulatedCuda(SimulatedGpu()) for _ in range(2)]
    devices[1].gpu.failing.add("capture")
    samplers = [sampler_on(cast(Device, device)) for device in devices]
    with pytest.warns(UserWarning, match="capture failed"):
        made = on_ranks(tmp_path, samplers, lambda one: run(one, **STG))
    for steps in made:
        assert_same(steps, run(sampler_on(Cpu()), **STG))
    assert sum(graph.replays for device in devices for graph in device.graphs) == 0


@pytest.mark.parametrize("given", CASES, ids=str)
def test_two_processes_are_one_for_every_family(
    golden_engines: Callable[[FamilyCase], Path], on_two_ranks: OnTwoRanks, given: FamilyCase
) -> None:
    one = VideoPipeline.from_pretrained(given.goldens, golden_engines(given), layout="segmented")
    two = on_two_ranks(one)
    for name in given.golden_names:
        # Each call has a generator of its own.
        alone, shared = (latents_of(pipe, **arguments(name, given.goldens)) for pipe in (one, two))
        assert distance(shared, alone) <= 1e-5, name


def test_two_processes_run_twins(
    golden_engines: Callable[[FamilyCase], Path], on_two_ranks: OnTwoRanks
) -> None:
    one = VideoPipeline.from_pretrained(LTX.goldens, golden_engines(LTX), layout="twin")
    call = arguments("stg_r", LTX.goldens)
    assert (latents_of(on_two_ranks(one), **call) - latents_of(one, **call)).abs().max() <= 1e-5


def test_callbacks_change_the_latents_of_all(golden: VideoPipeline, on_two_ranks: OnTwoRanks) -> None:
    def halve(pipe: Any, step: int, timestep: float, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        return {"latents": tensors["latents"] * 0.5} if step == 0 else None

    call = arguments("stg_a_rescale", LTX.goldens) | {"callback_on_step_end": halve}
    assert torch.equal(latents_of(on_two_ranks(golden), **call), latents_of(golden, **call))


def test_without_a_generator_all_draw_what_torch_would(
    golden: VideoPipeline, on_two_ranks: OnTwoRanks
) -> None:
    call = arguments("stg_a_rescale", LTX.goldens)
    del call["latents"]
    made = []
    for pipeline in (golden, on_two_ranks(golden)):
        # It adds noise in every step.
        pipeline.scheduler = FlowMatchLCMScheduler.from_config(pipeline.scheduler.config)
        torch.manual_seed(3)
        made.append(latents_of(pipeline, **call))
    assert torch.equal(*made)


def test_a_run_that_is_left_early_leaves_nothing_behind(
    golden: VideoPipeline, on_two_ranks: OnTwoRanks
) -> None:
    call = arguments("stg_a_rescale", LTX.goldens)
    two, expected = on_two_ranks(golden), latents_of(golden, **call)
    with two.stream(**call) as steps:
        next(steps)
    assert torch.equal(latents_of(two, **call), expected)

    def stop(pipe: Any, step: int, timestep: float, tensors: dict[str, Tensor]) -> None:
        pipe.interrupt = True

    left = latents_of(two, **call, callback_on_step_end=stop)
    assert torch.equal(left, latents_of(golden, **call, callback_on_step_end=stop))
    assert torch.equal(latents_of(two, **call), expected)


@pytest.mark.slow(reason="starts a rank's process three times")
def test_a_killed_rank_fails_the_call_and_the_next_one_starts_anew(golden: VideoPipeline) -> None:
    two = VideoPipeline(golden.checkpoint, golden.store, layout="segmented", guidance_parallel=2)
    call = arguments("stg_a_rescale", LTX.goldens)
    expected = latents_of(golden, **call)
    assert torch.equal(latents_of(two, **call), expected)
    killed_at: list[float] = []

    def kill(pipe: Any, step: int, timestep: float, tensors: dict[str, Tensor]) -> None:
        if step == 0:
            worker_of(pipe).kill()
            killed_at.append(time.monotonic())

    with pytest.raises(RankLost) as lost:
        two(**call, callback_on_step_end=kill)
    assert time.monotonic() - killed_at[0] < 10
    assert str(lost.value) == (
        "guidance_parallel: expected every rank to take all steps, got the end of one (rank 1 killed by "
        "SIGKILL): call again, which starts the ranks anew"
    )
    assert torch.equal(latents_of(two, **call), expected)
    worker = worker_of(two)
    worker.kill()
    worker.wait(10)
    # Between two calls nothing is lost.
    ranks = two._samplers._ranks
    while ranks is not None and ranks._running is not None and not ranks._running.ended:
        time.sleep(0.01)
    assert torch.equal(latents_of(two, **call), expected)
    last = worker_of(two)
    del two, ranks, lost
    gc.collect()
    # It ends with the pipeline, or this raises TimeoutExpired.
    last.wait(10)


def test_a_rank_says_what_went_wrong(golden: VideoPipeline, tmp_path: Path) -> None:
    ranks = Ranks(2)
    ranks.group(Cpu())
    [build] = [one for one in golden.store.builds if one.manifest.layout == "segmented"]
    said = pytest.raises(RankLost, match=r"\(rank 1: .*text.onnx: no such file: .*\): call again")
    with said, ranks.loading(replace(build, folder=tmp_path), golden.family):
        pass
    assert ranks._running is None


PARENT = """
import sys, time
from stg_trt.runtime.device import Cpu
from stg_trt.runtime.ranks import Ranks
ranks = Ranks(2)
ranks.group(Cpu())
print(ranks._running._processes[0].process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.slow(reason="starts processes that import torch")
@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_ranks_end_with_their_pipeline(ending: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, ending)
    parent.wait(10)
    assert worker.wait(10) is None
    parent.stdout.close()


@pytest.mark.slow(reason="starts the program with two ranks")
def test_the_command_line_makes_the_same_latents(ltx_engines: Path, embeds: Path, tmp_path: Path) -> None:
    made = []
    for ranks in (1, 2):
        output = tmp_path / f"{ranks}.safetensors"
        result = invoke(
            "generate", LTX.goldens, "--engines", ltx_engines, "--embeds", embeds,
            "--num-inference-steps", "3", "--stg-scale", "1", "--guidance-parallel", str(ranks),
            "--output", output,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        made.append(load_file(output)["latents"])
    assert torch.equal(*made)


def test_ranks_need_as_many_gpus(golden: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InvalidRequest, match="guidance_parallel: expected a number of GPUs from 1 to 5, got 9"
    ):
        VideoPipeline(golden.checkpoint, golden.store, guidance_parallel=9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    device = SimulatedCuda(SimulatedGpu())
    device.torch_device = torch.device("cuda", 0)
    with pytest.raises(BackendUnavailable) as refused:
        _check_gpus(2, cast(Device, device))
    assert str(refused.value) == (
        "guidance_parallel: expected 2 GPUs that are alike, and cuda:0 as the current one, got NVIDIA H200 "
        "and cuda:0: set CUDA_VISIBLE_DEVICES"
    )
