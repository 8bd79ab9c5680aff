"""Models whose engines all benchmarks share: two blocks of LTX-Video, and the tiny Wan of the goldens."""

from __future__ import annotations

from pathlib import Path

import pytest

from stg_trt.benchmarks.scenario import Scenario
from tests.conftest import BuiltOnce
from tests.support.cli import ROOT
from tests.support.family_cases import WAN, FamilyCase

MODEL = ROOT / "benchmarks/models/ltx-video-128x2"


@pytest.fixture(scope="session")
def engines(built_once: BuiltOnce) -> Path:
    """Where the first benchmark builds and the others, of any process, find the engines."""
    return built_once("benchmark-engines", lambda folder: None)


@pytest.fixture(scope="session")
def tiny(engines: Path) -> tuple[str, ...]:
    """Options of step, sample and peers."""
    size = ("--height=64", "--width=64", "--num-frames=9", "--text-length=8")
    return (f"--checkpoint={MODEL}", *size, "--stg-blocks=1", f"--engines={engines}")


@pytest.fixture(scope="session")
def tiny_wan(engines: Path) -> tuple[str, ...]:
    """The same of a family whose solver has a history, and with latents that are not packed."""
    size = [f"--{name.replace('_', '-')}={value}" for name, value in WAN.sizes.items()]
    return (f"--checkpoint={WAN.goldens}", *size, "--stg-blocks=2", f"--engines={engines}")


@pytest.fixture
def scenario() -> Scenario:
    """The LTX-Video model and size in Python."""
    return Scenario(str(MODEL), 64, 64, 9, 8, stg_mode="stg-a", stg_blocks=(1,), backend="onnxruntime")


@pytest.fixture
def wan_scenario() -> Scenario:
    """The Wan model and size in Python."""
    return scenario_of(WAN, "stg-a", (2,))


def scenario_of(case: FamilyCase, mode: str, blocks: tuple[int, ...]) -> Scenario:
    """A family's tiny transformer at the size of its goldens, on ONNX Runtime."""
    sizes = (case.workload.height, case.workload.width, case.workload.num_frames, case.workload.text_length)
    return Scenario(str(case.goldens), *sizes, stg_mode=mode, stg_blocks=blocks, backend="onnxruntime")
