"""The kernels as a library: their host tests with mutants, their interface, and a sampler that uses them."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from stg_trt import VideoPipeline
from stg_trt.engines.onnxruntime import OnnxRuntimeEngine
from stg_trt.errors import BackendUnavailable
from stg_trt.runtime.device import Cpu
from stg_trt.runtime.kernels import shared_library as kernel_library
from stg_trt.runtime.kernels.copy_rows import CopyRowsParameters, RowCopy
from stg_trt.runtime.kernels.fan_out_rows import FanOutRowsParameters
from stg_trt.runtime.kernels.guided_step import GuidedStepParameters
from stg_trt.runtime.kernels.operations import KernelOperations
from stg_trt.runtime.kernels.qk_norm_rope import QKNormRopeParameters
from stg_trt.runtime.kernels.shared_library import ABI, Kernels, load_kernels
from tests.support.compiled_kernels import (
    PLUGINS,
    ROOT,
    layout_in_header,
    layout_in_python,
    needs_cmake,
    needs_compiler,
    needs_nvcc,
    run,
)
from tests.support.family_cases import LTX
from tests.support.golden_calls import arguments, every_step

STRUCTS = {
    "StgGuidedStep": ("guided_step/guided_step.h", GuidedStepParameters),
    "StgFanOutRows": ("fan_out_rows/fan_out_rows.h", FanOutRowsParameters),
    "StgRowCopy": ("copy_rows/copy_rows.h", RowCopy),
    "StgCopyRows": ("copy_rows/copy_rows.h", CopyRowsParameters),
    "StgQKNormRope": ("qk_norm_rope/qk_norm_rope.h", QKNormRopeParameters),
}


@pytest.mark.slow(reason="compiles the kernels' tests and runs one per mutant")
@needs_cmake
def test_host_tests_and_their_mutants(tmp_path: Path) -> None:
    run("cmake", "-S", ROOT, "-B", tmp_path, "-DSTG_TRT_BUILD_KERNELS=OFF")
    run("cmake", "--build", tmp_path, "--parallel", "2")
    printed = run("ctest", "--test-dir", tmp_path)
    mutants = re.findall(r"^add_mutant(_test)?\(", (PLUGINS / "mutants.cmake").read_text(), re.MULTILINE)
    kernels = list(PLUGINS.glob("*/*_test.cpp"))
    of_the_emulation = 2
    # Each kernel as it is, and with its mutants but none of them chosen.
    tests = 2 * len(kernels) + of_the_emulation + len(mutants)
    assert re.search(rf"100% tests passed.* out of {tests}\b", printed), printed


@needs_cmake
@needs_compiler
def test_plugins_without_headers_say_what_to_set(tmp_path: Path) -> None:
    options = ["-DSTG_TRT_BUILD_TENSORRT_PLUGINS=ON", f"-DTENSORRT_ROOT={tmp_path}", "-DBUILD_TESTING=OFF"]
    with pytest.raises(AssertionError, match="set TENSORRT_ROOT to"):
        run("cmake", "-S", ROOT, "-B", tmp_path / "build", *options)


@needs_compiler
@pytest.mark.parametrize("struct", STRUCTS)
def test_parameters_have_the_layout_of_the_header(struct: str, tmp_path: Path) -> None:
    header, fields = STRUCTS[struct]
    names = [name for name, *_ in fields._fields_]
    assert layout_in_header(header, struct, names, tmp_path) == layout_in_python(fields)


def test_dtypes_and_version_are_those_of_the_header() -> None:
    header = (PLUGINS / "interface.h").read_text()
    assert f"#define STG_KERNELS_ABI {ABI}\n" in header
    for dtype, number in kernel_library.DTYPES.items():
        assert f"kStg{str(dtype).removeprefix('torch.').capitalize()} = {number}" in header


@needs_nvcc
def test_library_loads_without_a_gpu(library: Path) -> None:
    kernels = Kernels(library)
    assert kernels.workspace_bytes(2) == 2 * kernels.workspace_bytes(1) > 0


def test_library_of_another_version_is_refused(host_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_library, "ABI", ABI + 1)
    with pytest.raises(BackendUnavailable, match=f"expected interface {ABI + 1}, got {ABI}"):
        Kernels(host_library)


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "libstg_kernels.so"
    path.write_text("not a library")
    with pytest.raises(BackendUnavailable, match="run make kernels"):
        Kernels(path)


def test_missing_kernels_are_said_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_library, "_LIBRARY", tmp_path / "missing.so")
    load_kernels.cache_clear()
    with pytest.warns(UserWarning, match="steps run as torch operations"):
        assert load_kernels() is None
    load_kernels.cache_clear()


def test_what_a_kernel_refuses_is_an_error(host_library: Path) -> None:
    parameters = QKNormRopeParameters(rows=1, tokens=1, channels=8, group=3)
    with pytest.raises(RuntimeError, match="stg_qk_norm_rope: CUDA error 1"):
        Kernels(host_library).enqueue("stg_qk_norm_rope", parameters, 0)


class CountedKernels(Kernels):
    """Counts the calls of each kernel."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.calls: dict[str, int] = {}

    def enqueue(self, name: str, parameters: ctypes.Structure, stream: int) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        super().enqueue(name, parameters, stream)


@pytest.mark.parametrize("alignment", [1, 1024])
@pytest.mark.parametrize("case", LTX.golden_names)
def test_goldens_through_the_kernels(
    host_library: Path,
    monkeypatch: pytest.MonkeyPatch,
    ltx_engines: Path,
    ltx_checkpoint: Path,
    case: str,
    alignment: int,
) -> None:
    kernels, device = CountedKernels(host_library), Cpu()
    device.operations = KernelOperations(kernels)
    monkeypatch.setattr("stg_trt.runtime.samplers.open_device", lambda name: device)
    monkeypatch.setattr(OnnxRuntimeEngine, "alignment", alignment)
    pipeline = VideoPipeline.from_pretrained(ltx_checkpoint, engines=ltx_engines, layout="segmented")
    expected = load_file(ltx_checkpoint / f"{case}.safetensors")
    call = arguments(case, ltx_checkpoint)
    for i, latents in enumerate(every_step(pipeline, **call)):
        assert (latents - expected[f"expected_step_{i:02d}"]).abs().max() <= 1e-4, f"step {i}"
    steps = call["num_inference_steps"]
    assert kernels.calls["stg_guided_step"] == kernels.calls["stg_fan_out_rows"] == steps
    # One launch when the skip pass forks, one for each block that it passes by.
    bypassed = len(call["stg_blocks"]) if call["stg_mode"] == "stg-r" else 0
    launches = steps * (1 + bypassed) if call["stg_scale"] else 0
    copies = kernels.calls.get("stg_copy_rows", 0)
    assert copies == launches if alignment == 1 else copies > launches
