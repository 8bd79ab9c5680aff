"""Two tiny models, opened once, and a server of both for the tests that change no setting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stg_trt.runtime.server.served_model import ModelSource, ServedModel, ServedModels
from tests.conftest import BuiltOnce
from tests.support.family_cases import LTX, WAN, FamilyCase
from tests.support.running_server import Running, running

WholeEngines = Callable[[FamilyCase, Path], Path]


@pytest.fixture(scope="session")
def sources(built_once: BuiltOnce, whole_engines: WholeEngines) -> list[ModelSource]:
    """`wide`, 160x128 with 17 frames, which takes pictures, and `small`, 64x48 with 9, which takes none."""
    found = []
    for name, case in (("wide", LTX), ("small", WAN)):
        checkpoint = built_once(f"{case}-whole-checkpoint", case.save_pipeline)
        found.append(ModelSource(name, str(checkpoint), (whole_engines(case, checkpoint),)))
    return found


@pytest.fixture(scope="session")
def models(sources: list[ModelSource]) -> ServedModels:
    """Both, loaded once; one server at a time may use them."""
    return ServedModels([ServedModel.open(source) for source in sources])


@pytest.fixture(scope="module")
def server(models: ServedModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Of the tests of a module, which leave no job running."""
    with running(models, tmp_path_factory.mktemp("server")) as started:
        yield started
