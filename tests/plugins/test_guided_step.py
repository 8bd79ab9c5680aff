"""Guidance, rescale and solver in one kernel, against the torch reference."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from stg_trt.guidance.combine import combine
from stg_trt.models.stream import RescaleSpace
from stg_trt.runtime.guided_step import guided_step
from stg_trt.runtime.kernels.guided_step import GuidedStepKernel
from stg_trt.runtime.step_key import StepKey
from tests.support.compiled_kernels import Machine
from tests.support.passes import named
from tests.support.step_states import SOLVERS, STEPS, state_of, tables


def check_every_step(
    machine: Machine,
    passes: tuple[str, ...],
    dtype: str,
    videos: int,
    length: int,
    name: str,
    steps: int = STEPS,
    *,
    rescaled: bool = True,
    cfg_zero_star: bool = False,
    rescale_space: RescaleSpace = "prediction",
) -> None:
    guidance, solver = tables(name, passes)
    guidance = replace(guidance, cfg_zero_star=cfg_zero_star, rescale_space=rescale_space)
    keys = [replace(StepKey.of(guidance, solver, step), rescaled=rescaled) for step in range(STEPS)]
    assert all(tuple(one.name for one in key.passes) == passes for key in keys)
    # A group more than there are passes, which nobody may read.
    groups = 2 + len(passes)
    expected, got = (state_of(videos, length, dtype, machine.device, name, groups) for _ in range(2))
    for absent in {*range(groups)} - {*keys[0].groups}:
        got.buffers.view("pred", range(absent, absent + 1)).fill_(float("nan"))
    for state in (expected, got):
        state.table.load(guidance, solver)
    kernels = {key: GuidedStepKernel(machine.kernels, got, key) for key in set(keys)}
    for step, key in enumerate(keys[:steps]):
        guided_step(expected, key)
        machine.enqueue(kernels[key])
        assert int(got.table.counter) == step + 1
        torch.testing.assert_close(got.latents, expected.latents, rtol=2e-5, atol=2e-5)


PASSES = ("uncond", "cond", "skip")
PASS_SETS = [("cond",), ("uncond", "cond"), ("cond", "skip"), PASSES, ("uncond", "cond", "a", "b", "c")]
DTYPES = ["float32", "float16", "bfloat16"]


@pytest.mark.parametrize(
    ("passes", "dtype", "length", "name"),
    [
        *product(PASS_SETS, DTYPES, [2, 7], SOLVERS),
        *product([PASSES], DTYPES, [4096], SOLVERS),
        *zip(PASS_SETS[2:], DTYPES, [5_001] * 3, SOLVERS, strict=True),
    ],
)
def test_kernel_equals_the_reference(
    machine: Machine, passes: tuple[str, ...], dtype: str, length: int, name: str
) -> None:
    check_every_step(machine, passes, dtype, 2, length, name)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("passes", [("uncond", "cond"), PASSES])
@pytest.mark.parametrize(("dtype", "length"), [("float32", 7), ("bfloat16", 4096)])
@pytest.mark.parametrize("name", SOLVERS)
def test_cfg_zero_star_equals_the_reference(
    machine: Machine, passes: tuple[str, ...], dtype: str, length: int, name: str, rescaled: bool
) -> None:
    check_every_step(machine, passes, dtype, 2, length, name, rescaled=rescaled, cfg_zero_star=True)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize(("dtype", "length"), [("float32", 7), ("bfloat16", 4096)])
@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_a_rescale_of_clean_latents_equals_the_reference(
    machine: Machine, dtype: str, length: int, name: str, rescaled: bool
) -> None:
    check_every_step(machine, PASSES, dtype, 2, length, name, rescaled=rescaled, rescale_space="x0")


def test_cfg_zero_star_of_a_ragged_half_precision_equals_the_reference(machine: Machine) -> None:
    check_every_step(machine, PASSES, "float16", 2, 5_001, SOLVERS[0], cfg_zero_star=True)


@pytest.mark.slow(reason="runs half a million threads on the host")
def test_more_values_than_the_largest_grid_has_threads_for(machine: Machine) -> None:
    """In the first step, and in one that reads the history."""
    check_every_step(machine, PASSES, "bfloat16", 1, 600_001, "unipc", steps=2)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_reference_steps_as_the_solver_does(name: str) -> None:
    guidance, solver = tables(name)
    state = state_of(2, 5, "float32", torch.device("cpu"), name)
    state.table.load(guidance, solver)
    latents, initial = state.latents.clone(), state.latents.clone()
    noise = torch.full((sum(solver.draws), 2, 5), torch.nan)
    if name == "cogvideox_dpm":
        assert state.history is not None
        noise[list(solver.used_draws(STEPS))] = state.history[state.table.capacity :]
    preds: list[torch.Tensor] = []
    for step, pair in enumerate(solver.single_step):
        rows = state.buffers.view("pred").unflatten(0, (3, 2))
        preds.append(combine(rows, torch.tensor([-2.0, 4.0, -1.0]), cond=1, rescale=guidance.rescale[step]))
        latents = solver.advance(step, latents, preds, initial, list(noise))
        guided_step(state, StepKey(named(PASSES), True, pair is not None, cfg_zero_star=False))
        torch.testing.assert_close(state.latents, latents, rtol=2e-5, atol=2e-5)


def test_every_frame_has_its_own_weights(machine: Machine) -> None:
    frames, length = 3, 24
    guidance, solver = tables()
    key = StepKey.of(guidance, solver, 0)
    expected, got = (state_of(2, length, "float32", machine.device) for _ in range(2))
    for state in (expected, got):
        state.table.load(guidance, solver)
    scales = torch.tensor([1.0, 0.5, 2.0], device=machine.device)
    got.table.weights = got.table.weights * scales
    guided = []
    for frame, scale in enumerate(scales):
        part = state_of(2, length, "float32", machine.device)
        part.table.load(guidance, solver)
        part.table.weights *= scale
        guided_step(part, replace(key, rescaled=False))
        guided.append(part.latents.unflatten(1, (frames, -1))[:, frame])
    machine.enqueue(GuidedStepKernel(machine.kernels, got, replace(key, rescaled=False)))
    torch.testing.assert_close(got.latents, torch.stack(guided, 1).flatten(1), rtol=2e-5, atol=2e-5)
