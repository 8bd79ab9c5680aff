"""The kernels: their arithmetic on the host, with mutants; their interface; on a GPU the kernels."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from stg_trt.errors import BackendUnavailable
from stg_trt.families.base import keep_attention_spec
from stg_trt.guidance import Guidance
from stg_trt.guided_step import StepState, guided_step
from stg_trt.kernels import ABI, GuidedStepKernel, GuidedStepParameters, Kernels, load_kernels
from stg_trt.solver import SolverTable
from stg_trt.step_runner import StepBuffers
from stg_trt.step_table import StepTable
from stg_trt.tensor_spec import ROWS, TensorSpec

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "plugins" / "guided_step" / "guided_step.h"

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_cmake
def test_arithmetic_and_its_mutants(tmp_path: Path) -> None:
    run("cmake", "-S", ROOT, "-B", tmp_path, "-DSTG_TRT_BUILD_KERNELS=OFF")
    run("cmake", "--build", tmp_path, "--parallel", "2")
    printed = run("ctest", "--test-dir", tmp_path)
    mutants = re.findall(r"add_mutant\(", (ROOT / "plugins" / "mutants.cmake").read_text())
    assert re.search(rf"100% tests passed.* out of {1 + len(mutants)}\b", printed), printed


def test_parameters_have_the_layout_of_the_header(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    names = [name for name, *_ in GuidedStepParameters._fields_]
    lines = "".join(f'printf("%zu\\n", offsetof(StgGuidedStep, {name}));' for name in names)
    source = tmp_path / "layout.cpp"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\n'
        f'int main() {{ {lines} printf("%zu %d\\n", sizeof(StgGuidedStep), STG_KERNELS_ABI); }}\n'
    )
    run(compiler, source, "-o", tmp_path / "layout")
    *offsets, last = run(tmp_path / "layout").split("\n")[:-1]
    assert [int(offset) for offset in offsets] == [getattr(GuidedStepParameters, n).offset for n in names]
    assert last == f"{ctypes.sizeof(GuidedStepParameters)} {ABI}"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels compiled for one architecture; loading needs no GPU."""
    path = tmp_path_factory.mktemp("kernels") / "libstg_kernels.so"
    source = ROOT / "plugins" / "guided_step" / "guided_step.cu"
    architecture = os.environ.get(
        "STG_TRT_TEST_ARCHITECTURE", "native" if torch.cuda.is_available() else "sm_90"
    )
    run(
        "nvcc",
        "-O3",
        "-std=c++17",
        f"-arch={architecture}",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        source,
        "-o",
        path,
    )
    return path


@needs_nvcc
def test_library_loads_without_a_gpu(library: Path) -> None:
    kernels = Kernels(library)
    assert kernels.workspace_bytes(2) == 2 * kernels.workspace_bytes(1) > 0


@needs_nvcc
def test_library_of_another_version_is_refused(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stg_trt.kernels.ABI", ABI + 1)
    with pytest.raises(BackendUnavailable, match=f"expected interface {ABI + 1}, got {ABI}"):
        Kernels(library)


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "libstg_kernels.so"
    path.write_text("not a library")
    with pytest.raises(BackendUnavailable, match="run make kernels"):
        Kernels(path)


def test_missing_kernels_are_said_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stg_trt.kernels._LIBRARY", tmp_path / "missing.so")
    load_kernels.cache_clear()
    with pytest.warns(UserWarning, match="guidance runs as torch operations"):
        assert load_kernels() is None
    load_kernels.cache_clear()


def state_of(videos: int, length: int, dtype: str, device: str, multistep: bool) -> StepState:
    specs = [TensorSpec("pred", dtype, (ROWS, length)), keep_attention_spec()]
    torch_device = torch.device(device)
    generator = torch.Generator().manual_seed(length)
    state = StepState(
        buffers=StepBuffers(specs, frozenset(), videos, torch_device),
        table=StepTable(8, torch_device),
        latents=torch.zeros(videos, length, device=torch_device),
        initial=torch.zeros(videos, length, device=torch_device),
        history=torch.zeros(8, videos, length, device=torch_device) if multistep else None,
    )
    state.start(torch.randn(videos, length, generator=generator).to(torch_device))
    state.buffers.view("pred").copy_(torch.randn(3 * videos, length, generator=generator) + 1)
    return state


def tables(multistep: bool) -> tuple[Guidance, SolverTable]:
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    flow = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    solver = SolverTable.from_scheduler(flow if multistep else FlowMatchEulerDiscreteScheduler(), 6)
    guidance = Guidance.for_steps(
        [t / 1000 for t in solver.timesteps], guidance_scale=3.0, stg_scale=1.0, rescale=0.7, stg_blocks=[0]
    )
    return guidance, solver


@pytest.mark.gpu
@needs_nvcc
@pytest.mark.parametrize(
    "passes", [("cond",), ("uncond", "cond"), ("cond", "skip"), ("uncond", "cond", "skip")]
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("length", [2, 7, 4096, 100_001])
@pytest.mark.parametrize("multistep", [False, True])
def test_kernel_equals_the_reference(
    library: Path, passes: tuple[str, ...], dtype: str, length: int, multistep: bool
) -> None:
    guidance, solver = tables(multistep)
    expected, got = (state_of(2, length, dtype, "cuda", multistep) for _ in range(2))
    for group in {"uncond", "cond", "skip"} - set(passes):
        got.buffers.view("pred", (group,)).fill_(float("nan"))
    for state in (expected, got):
        state.table.load(guidance, solver)
    kernel = GuidedStepKernel(Kernels(library), got, passes, rescaled=True, two_term=not multistep)
    for step in range(6):
        guided_step(expected, passes, rescaled=True, two_term=not multistep, cfg_zero_star=False)
        kernel.enqueue(torch.cuda.current_stream().cuda_stream)
        assert int(got.table.counter) == step + 1
        torch.testing.assert_close(got.latents, expected.latents, rtol=2e-5, atol=2e-5)
