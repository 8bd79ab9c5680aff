"""Guidance, rescale and solver in one kernel, against the torch reference."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from stg_trt.guidance.combine import combine
from stg_trt.models.passes import PASSES, Pass
from stg_trt.runtime.guided_step import guided_step
from stg_trt.runtime.kernels.guided_step import GuidedStepKernel
from stg_trt.runtime.step_key import StepKey
from tests.support.compiled_kernels import Machine
from tests.support.step_states import SOLVERS, STEPS, state_of, tables


def check_every_step(
    machine: Machine,
    passes: tuple[Pass, ...],
    dtype: str,
    videos: int,
    length: int,
    name: str,
    steps: int = STEPS,
    *,
    rescaled: bool = True,
    cfg_zero_star: bool = False,
) -> None:
    guidance, solver = tables(name)
    keys = [StepKey(passes, None, rescaled, pair is not None, cfg_zero_star) for pair in solver.single_step]
    expected, got = (state_of(videos, length, dtype, machine.device, name) for _ in range(2))
    for absent in {*PASSES} - {*passes}:
        got.buffers.view("pred", (absent,)).fill_(float("nan"))
    for state in (expected, got):
        state.table.load(guidance, solver)
    kernels = {key: GuidedStepKernel(machine.kernels, got, key) for key in set(keys)}
    for step, key in enumerate(keys[:steps]):
        guided_step(expected, key)
        machine.enqueue(kernels[key])
        assert int(got.table.counter) == step + 1
        torch.testing.assert_close(got.latents, expected.latents, rtol=2e-5, atol=2e-5)


PASS_SETS = [("cond",), ("uncond", "cond"), ("cond", "skip"), PASSES]
DTYPES = ["float32", "float16", "bfloat16"]


@pytest.mark.parametrize(
    ("passes", "dtype", "length", "name"),
    [
        *product(PASS_SETS, DTYPES, [2, 7], SOLVERS),
        *product([PASSES], DTYPES, [4096], SOLVERS),
        *zip(PASS_SETS[1:], DTYPES, [5_001] * 3, SOLVERS, strict=True),
    ],
)
def test_kernel_equals_the_reference(
    machine: Machine, passes: tuple[Pass, ...], dtype: str, length: int, name: str
) -> None:
    check_every_step(machine, passes, dtype, 2, length, name)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("passes", [("uncond", "cond"), PASSES])
@pytest.mark.parametrize(("dtype", "length"), [("float32", 7), ("bfloat16", 4096)])
@pytest.mark.parametrize("name", SOLVERS)
def test_cfg_zero_star_equals_the_reference(
    machine: Machine, passes: tuple[Pass, ...], dtype: str, length: int, name: str, rescaled: bool
) -> None:
    check_every_step(machine, passes, dtype, 2, length, name, rescaled=rescaled, cfg_zero_star=True)


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
        uncond, cond, skip = state.buffers.view("pred").split(2)
        preds.append(
            combine(cond, uncond, skip, cfg_scale=3.0, stg_scale=1.0, rescale=guidance.rescale[step])
        )
        latents = solver.advance(step, latents, preds, initial, list(noise))
        guided_step(state, StepKey(PASSES, None, True, pair is not None, cfg_zero_star=False))
        torch.testing.assert_close(state.latents, latents, rtol=2e-5, atol=2e-5)
