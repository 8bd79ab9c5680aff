"""Builds for the GPU of this machine, which a test names."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from stg_trt.build_engines import build, compile_tensorrt
from stg_trt.errors import BackendUnavailable

# In its package, the function of that name hides the module.
BUILD = importlib.import_module("stg_trt.build_engines.build")
SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 9, "text_length": 4}


def test_without_a_gpu_a_build_for_it_is_refused_in_one_line(
    tmp_path: Path, ltx_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_tensorrt, "library_version", lambda backend: "11.4.0")
    monkeypatch.setattr(BUILD, "find_gpu", lambda: None)
    with pytest.raises(BackendUnavailable) as caught:
        build(ltx_checkpoint, tmp_path / "engines", **SIZE, backend="tensorrt", stg_blocks=[])
    assert str(caught.value) == (
        "tensorrt: expected an NVIDIA GPU for --target this-gpu, got none: build on the machine that will "
        "run the engines, or use --backend onnxruntime"
    )
    assert not (tmp_path / "engines").exists()
