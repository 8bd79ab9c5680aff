from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from stg_trt.engines.tensorrt_library import load_library
from stg_trt.errors import BackendUnavailable


@pytest.mark.parametrize("version", ["10.15.1.29", "10.16.1.11", "11.0.0.114", "11.4.0.106"])
def test_one_code_path_serves_tensorrt_10_15_to_11(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    assert load_library("tensorrt").__version__ == version


@pytest.mark.parametrize("version", ["8.6.1", "10.2.0.19", "10.14.1.48.post1", "12.0.0.1"])
def test_other_versions_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    with pytest.raises(BackendUnavailable) as caught:
        load_library("tensorrt")
    assert str(caught.value) == (
        f"tensorrt: expected version 10.15 to 11.x, got {version}: pip install --upgrade 'stg-trt[tensorrt]'"
    )


def test_an_old_tensorrt_rtx_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.6.0.13"))
    with pytest.raises(BackendUnavailable, match=r"tensorrt-rtx: expected version 1\.7 to 1\.x, got 1\.6"):
        load_library("tensorrt-rtx")


@pytest.mark.parametrize("extra", ["tensorrt", "tensorrt-rtx", "inductor"])
def test_every_gpu_extra_brings_what_captured_graphs_import(extra: str) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert any(need.startswith("cuda-bindings>=") for need in project["optional-dependencies"][extra])
