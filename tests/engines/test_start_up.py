"""Starting reads no gigabytes: hashes of weights and engines are kept, and `inspect --verify` reads all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from stg_trt import VideoPipeline
from stg_trt.engines.store import EngineStore
from stg_trt.runtime.device import Cpu
from tests.support.cli import assert_one_line_error, invoke


@pytest.fixture
def engines(ltx_engines: Path, tmp_path: Path) -> Path:
    """A copy of one build, of files that were written long ago."""
    source = next(build.folder for build in EngineStore.open(ltx_engines).builds)
    shutil.copytree(source, tmp_path / "engines" / source.name)
    return aged(tmp_path / "engines")


def aged(folder: Path) -> Path:
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return folder


def test_no_file_is_read_twice(
    engines: Path, ltx_checkpoint: Path, tmp_path: Path, hashed_files: list[Path]
) -> None:
    checkpoint = aged(Path(shutil.copytree(ltx_checkpoint, tmp_path / "model")))
    for _ in range(2):
        pipeline = VideoPipeline.from_pretrained(checkpoint, engines=engines)
        pipeline.store.builds[0].load_engines(Cpu())
    assert {path.suffix for path in hashed_files} == {".safetensors", ".onnx"}
    assert len(hashed_files) == len({*hashed_files})


def test_verify_reads_a_file_that_looks_the_same(engines: Path) -> None:
    """Of the same size and time: what starts quickly cannot notice it."""
    build = EngineStore.open(engines).builds[0]
    build.check_files()
    assert invoke("inspect", engines, "--verify").returncode == 0
    path = build.folder / "back.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    aged(engines)
    build.check_files()
    result = invoke("inspect", engines, "--verify")
    assert_one_line_error(
        result, r"back\.onnx: its contents changed after the build: build the engines again"
    )
