"""The row fan-out, against the torch reference."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from stg_trt.runtime.guided_step import fan_out_rows, guided_step
from stg_trt.runtime.kernels.copy_rows import CopyRowsKernel
from stg_trt.runtime.kernels.fan_out_rows import FanOutRowsKernel
from stg_trt.runtime.kernels.guided_step import GuidedStepKernel
from stg_trt.runtime.state import StepState
from stg_trt.runtime.step_key import StepKey
from tests.support.compiled_kernels import Machine
from tests.support.passes import named
from tests.support.step_states import STEPS, state_of, tables

POISON = -777.0


def poisoned(state: StepState) -> StepState:
    guidance, solver = tables()
    state.table.load(guidance, solver)
    # The scheduler's own scale is 1, which shows nothing.
    state.table.device_values("input_scale")["input_scale"].copy_(torch.linspace(0.3, 1.7, 8))
    for name in ("latents", "timestep"):
        state.buffers.view(name).fill_(POISON)
    return state


GROUPS = [range(1, 2), range(2), range(1, 3), range(3)]
DTYPES = ["float32", "float16", "bfloat16"]


@pytest.mark.parametrize(
    ("groups", "dtype", "videos", "length"),
    [
        *product(GROUPS, DTYPES, [1, 3], [1, 7, 8]),
        *product([range(3)], DTYPES, [1, 3], [4096]),
        *zip(GROUPS[1:], DTYPES, [1, 1, 3], [100_003] * 3, strict=True),
    ],
)
def test_kernel_equals_the_reference(
    machine: Machine, groups: range, dtype: str, videos: int, length: int
) -> None:
    expected, got = (poisoned(state_of(videos, length, dtype, machine.device)) for _ in range(2))
    kernel = FanOutRowsKernel(machine.kernels, got, groups)
    for _ in range(STEPS):
        fan_out_rows(expected, groups)
        machine.enqueue(kernel)
        for name in ("latents", "timestep"):
            assert torch.equal(got.buffers.view(name), expected.buffers.view(name))
        untouched = (got.buffers.view("timestep", range(i, i + 1)) for i in {*range(3)} - {*groups})
        assert all((rows == POISON).all() for rows in untouched)
        for state in (expected, got):
            state.table.advance()


@pytest.mark.gpu
@pytest.mark.parametrize("length", [4096, 100_003])
def test_one_graph_serves_all_steps(machine: Machine, length: int) -> None:
    if machine.device.type == "cpu":
        pytest.skip("graphs need a GPU")
    expected, got = (poisoned(state_of(2, length, "bfloat16", machine.device)) for _ in range(2))
    key = StepKey(named(("uncond", "cond", "skip")), rescaled=True, single_step=True, cfg_zero_star=False)
    enqueued = (
        FanOutRowsKernel(machine.kernels, got, range(3)),
        # In place of a model: the predictions are the rows.
        CopyRowsKernel(machine.kernels, [(got.buffers.view("pred"), got.buffers.view("latents"))]),
        GuidedStepKernel(machine.kernels, got, key),
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for kernel in enqueued:
            machine.enqueue(kernel)
    for step in range(STEPS):
        graph.replay()
        fan_out_rows(expected, range(3))
        expected.buffers.view("pred").copy_(expected.buffers.view("latents"))
        guided_step(expected, key)
        assert int(got.table.counter) == step + 1
        torch.testing.assert_close(got.latents, expected.latents, rtol=1e-3, atol=1e-3)
