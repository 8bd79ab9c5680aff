"""The kernels, compiled once per run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from stg_trt.kernels.shared_library import Kernels
from tests.compiled_kernels import Machine, compile_host_kernels, compile_kernels


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels compiled for one architecture; loading needs no GPU."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    return compile_kernels(tmp_path_factory.mktemp("kernels") / "libstg_kernels.so")


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels' interface over host memory."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return compile_host_kernels(tmp_path_factory.mktemp("host_kernels") / "libstg_kernels.so")


@pytest.fixture(scope="session", params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    """Every test that takes it runs on the host, and on a GPU where there is one."""
    if request.param == "gpu":
        return Machine(Kernels(request.getfixturevalue("library")), torch.device("cuda"))
    return Machine(Kernels(request.getfixturevalue("host_library")), torch.device("cpu"))
