"""Headers and driver library that torch alone does not find."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from stg_trt.engines import cuda_toolkit


def toolkit(folder: Path) -> Path:
    (folder / "include").mkdir(parents=True)
    for name in ("cuda.h", "cuda_runtime_api.h"):
        (folder / "include" / name).touch()
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose nvcc is a script in a folder without a toolkit."""
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path / "local"))
    monkeypatch.setattr(cuda_toolkit, "_USUAL_PLACE", tmp_path / "local" / "cuda")
    monkeypatch.setattr(cuda_toolkit, "_wheels", lambda: [tmp_path / "wheels"])
    return tmp_path


def test_the_toolkit_is_found_beside_the_place_that_torch_takes(elsewhere: Path) -> None:
    assert cuda_toolkit.cuda_toolkit() is None
    for place in ("wheels", "local/cuda", "local"):
        assert cuda_toolkit.cuda_toolkit() != elsewhere / place
        assert toolkit(elsewhere / place) == cuda_toolkit.cuda_toolkit()


def test_torch_builds_with_the_toolkit_that_was_found(elsewhere: Path) -> None:
    found = toolkit(elsewhere / "wheels")
    with cuda_toolkit.cuda_build():
        assert str(found / "include") in cpp_extension.include_paths("cuda")
    assert str(elsewhere / "local") == cpp_extension.CUDA_HOME


@pytest.mark.parametrize("searched", [None, "/searched"])
def test_the_loaded_driver_can_be_linked_with(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, searched: str | None
) -> None:
    monkeypatch.delenv("LIBRARY_PATH", raising=False)
    if searched:
        monkeypatch.setenv("LIBRARY_PATH", searched)
    source, driver = elsewhere / "driver.c", elsewhere / "libcuda.so.580.1"
    source.write_text("int only_in_this_driver(void) { return 0; }")
    subprocess.run(["g++", "-shared", "-fPIC", "-xc", source, "-o", driver], check=True)
    caller = elsewhere / "caller.c"
    caller.write_text("int only_in_this_driver(void); int main(void) { return only_in_this_driver(); }")
    monkeypatch.setattr(cuda_toolkit, "loaded_library", lambda name: driver)
    with cuda_toolkit.cuda_build():
        subprocess.run(["g++", "-xc", caller, "-xnone", "-lcuda", "-o", elsewhere / "caller"], check=True)
    assert os.environ.get("LIBRARY_PATH") == searched


def test_a_loaded_library_is_found_by_its_name() -> None:
    found = cuda_toolkit.loaded_library("libtorch_cpu.so")
    assert found is not None and found.is_file()
    assert cuda_toolkit.loaded_library("libof_no_process.so") is None
