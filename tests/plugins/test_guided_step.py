"""Guidance, rescale and solver in one kernel, against the torch reference."""

from __future__ import annotations

import pytest
import torch

from stg_trt.guided_step import guided_step
from stg_trt.kernels.guided_step import GuidedStepKernel
from tests.compiled_kernels import Machine
from tests.step_states import STEPS, state_of, tables


@pytest.mark.parametrize(
    "passes", [("cond",), ("uncond", "cond"), ("cond", "skip"), ("uncond", "cond", "skip")]
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("length", [2, 7, 4096, 100_001])
@pytest.mark.parametrize("multistep", [False, True])
def test_kernel_equals_the_reference(
    machine: Machine, passes: tuple[str, ...], dtype: str, length: int, multistep: bool
) -> None:
    guidance, solver = tables(multistep)
    expected, got = (state_of(2, length, dtype, machine.device, multistep) for _ in range(2))
    for group in {"uncond", "cond", "skip"} - set(passes):
        got.buffers.view("pred", (group,)).fill_(float("nan"))
    for state in (expected, got):
        state.table.load(guidance, solver)
    kernel = GuidedStepKernel(machine.kernels, got, passes, rescaled=True, two_term=not multistep)
    for step in range(STEPS):
        guided_step(expected, passes, rescaled=True, two_term=not multistep, cfg_zero_star=False)
        machine.enqueue(kernel)
        assert int(got.table.counter) == step + 1
        torch.testing.assert_close(got.latents, expected.latents, rtol=2e-5, atol=2e-5)
