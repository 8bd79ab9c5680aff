"""A model of two blocks whose engines all benchmarks share."""

from __future__ import annotations

from pathlib import Path

import pytest

from stg_trt.benchmarks.setting import Setting
from tests.cli import ROOT

MODEL = ROOT / "benchmarks/models/ltx-video-128x2"


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first benchmark builds and the others find the engines."""
    return tmp_path_factory.mktemp("benchmark-engines")


@pytest.fixture(scope="session")
def tiny(engines: Path) -> tuple[str, ...]:
    """Options of step, sample and peers."""
    size = ("--height=64", "--width=64", "--num-frames=9", "--text-length=8")
    return (f"--checkpoint={MODEL}", *size, "--stg-blocks=1", f"--engines={engines}")


@pytest.fixture
def setting() -> Setting:
    """The same model and size in Python."""
    return Setting(str(MODEL), 64, 64, 9, 8, stg_mode="stg-a", stg_blocks=(1,), backend="onnxruntime")
