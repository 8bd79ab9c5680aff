"""Timesteps of single tokens: each has the table's entry of its place, without a lookup."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from stg_trt.engines.store import EngineStore
from stg_trt.models.families.token_timesteps import TIMESTEP_INDEX, of_tokens
from tests.support.family_cases import LTX, FamilyCase


@pytest.mark.parametrize("places", [2, 4])
def test_every_token_has_the_entry_of_its_place(places: int) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3, places, 8, generator=generator)
    index = torch.randint(places, (50,), generator=generator)
    (found,) = of_tokens([table], {TIMESTEP_INDEX: index})
    assert torch.equal(found, table.index_select(1, index))


def test_no_engine_looks_entries_up(golden_engines: Callable[[FamilyCase], Path]) -> None:
    """TensorRT-RTX makes the lookups of all blocks first, so that its memory grows with their number."""
    build = next(one for one in EngineStore.open(golden_engines(LTX)).builds if one.manifest.layout == "twin")
    (record,) = (one for one in build.manifest.segments if one.segment.name == "normal")
    graph = ir.load(build.folder / record.files[0].name).graph
    (index,) = (value for value in graph.inputs if value.name == TIMESTEP_INDEX)
    users = [node for node in graph if index in node.inputs]
    assert users and not [node for node in users if node.op_type.startswith("Gather")]
