"""Models whose engines all benchmarks share; as tiny as those of the goldens, whose graphs they have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from stg_trt.benchmarks.scenario import Scenario
from tests.conftest import BuiltOnce
from tests.support.family_cases import LTX, WAN, FamilyCase
from tests.support.scenarios import scenario_of


@pytest.fixture(scope="session")
def engines(built_once: BuiltOnce) -> Path:
    """Where the first benchmark builds and the others, of any process, find the engines."""
    return built_once("benchmark-engines", lambda folder: None)


@pytest.fixture(scope="session")
def model(built_once: BuiltOnce) -> Path:
    """Configurations of two blocks of LTX-Video, without weights."""
    return built_once("benchmark-model", write_configurations) / "ltx-video-32x2"


def write_configurations(root: Path) -> None:
    folder = root / "ltx-video-32x2"
    shutil.copytree(LTX.goldens / "scheduler", folder / "scheduler")
    config = json.loads((LTX.goldens / "transformer" / "config.json").read_text())
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config | {"num_layers": 2}))


@pytest.fixture(scope="session")
def tiny(engines: Path, model: Path) -> tuple[str, ...]:
    """Options of step, sample and peers."""
    return options_of(LTX, model, engines, block=1)


@pytest.fixture(scope="session")
def tiny_wan(engines: Path) -> tuple[str, ...]:
    """The same of a family whose solver has a history, and with latents that are not packed."""
    return options_of(WAN, WAN.goldens, engines, block=2)


def options_of(case: FamilyCase, checkpoint: Path, engines: Path, block: int) -> tuple[str, ...]:
    """A family's options at the size of its goldens."""
    size = [f"--{name.replace('_', '-')}={value}" for name, value in case.sizes.items()]
    return (f"--checkpoint={checkpoint}", *size, f"--stg-blocks={block}", f"--engines={engines}")


@pytest.fixture
def scenario(model: Path) -> Scenario:
    """The LTX-Video model and size in Python."""
    return scenario_of(LTX, "stg-a", (1,), model)


@pytest.fixture
def wan_scenario() -> Scenario:
    """The Wan model and size in Python."""
    return scenario_of(WAN, "stg-a", (2,))
