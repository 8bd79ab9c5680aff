"""The kernels, compiled once per run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from stg_trt.runtime.kernels.shared_library import Kernels
from tests.conftest import BuiltOnce
from tests.support.compiled_kernels import Machine, compile_host_kernels, compile_kernels

LIBRARY = "libstg_kernels.so"


@pytest.fixture(scope="session")
def library(built_once: BuiltOnce) -> Path:
    """The kernels compiled for one architecture, or those a variable names; loading needs no GPU."""
    if given := os.environ.get("STG_TRT_TEST_KERNELS"):
        return Path(given)
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    return built_once("kernels", lambda folder: compile_kernels(folder / LIBRARY)) / LIBRARY


@pytest.fixture(scope="session")
def host_library(built_once: BuiltOnce) -> Path:
    """The same kernels over host memory, on an emulation of CUDA."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return built_once("host-kernels", lambda folder: compile_host_kernels(folder / LIBRARY)) / LIBRARY


@pytest.fixture(scope="session", params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    """Every test that takes it runs on the host, and on a GPU if there is one."""
    if request.param == "gpu":
        return Machine(Kernels(request.getfixturevalue("library")), torch.device("cuda"))
    return Machine(Kernels(request.getfixturevalue("host_library")), torch.device("cpu"))
