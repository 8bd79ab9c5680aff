"""Engines live as long as their family's graphs stay the same, which its export version says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from stg_trt.build_engines.weights import weights_of
from stg_trt.engines.key import export_version
from stg_trt.engines.store import Build, EngineStore
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.segment import Segment
from tests.support.family_cases import CASES, FamilyCase
from tests.support.golden_builds import LTX2, OPEN_SORA
from tests.support.tiny_svd import SVD

RECORD = Path(__file__).with_name("export_versions.json")
EXPORTERS = ("torch", "onnxscript", "onnx-ir")
# Constants of more values are weights, whose values are no part of a graph.
_FEW = 16


def digest_of(checkpoint: Checkpoint, engines: Path) -> str:
    """Of all graphs of the goldens, and of the weights that stay float32."""
    lines = [line for build in EngineStore.open(engines).builds for line in lines_of(build)]
    return hashlib.sha256("\n".join([*lines, *precisions(checkpoint)]).encode()).hexdigest()[:16]


def lines_of(build: Build) -> Iterator[str]:
    for record in build.manifest.segments:
        yield f"{build.manifest.layout} {build.manifest.stg_mode} {record.segment}"
        (path,) = (build.folder / file.name for file in record.files)
        graph = ir.load(path).graph
        yield from (f"{value.name} {value.shape} {value.dtype}" for value in (*graph.inputs, *graph.outputs))
        yield from (f"{value.name} {constant(value.const_value)}" for value in graph.initializers.values())
        for node in graph:
            given, made = (
                [value and value.name for value in values] for values in (node.inputs, node.outputs)
            )
            attributes = {name: attribute(value) for name, value in sorted(node.attributes.items())}
            yield f"{node.op_identifier()} {given} {made} {attributes}"


def attribute(value: ir.Attr) -> str:
    return constant(value.as_tensor()) if value.type == ir.AttributeType.TENSOR else str(value.value)


def constant(tensor: ir.TensorProtocol | None) -> str:
    """Its values to six digits: the last ones depend on the processor that folded them."""
    assert tensor is not None
    values = [f"{value:.6g}" for value in tensor.numpy().flatten().tolist()] if tensor.size <= _FEW else []
    return f"{tensor.dtype} {tensor.shape} {values}"


def precisions(checkpoint: Checkpoint) -> list[str]:
    """The dtype of every weight of a model in bfloat16."""
    family = checkpoint.family
    whole = Segment("normal", 0, family.num_blocks, front=True, back=True)
    module = family.module(checkpoint.load_transformer(), whole, expand_masks=True)
    family.lower_precision(module, torch.bfloat16)
    return [f"{name} {weight.dtype}" for name, weight in weights_of(module)]


def test_other_graphs_of_svd(svd_engines: Path) -> None:
    assert_recorded("svd", Checkpoint.open(SVD), svd_engines)


@pytest.mark.parametrize("version", LTX2)
def test_other_graphs_of_ltx2(ltx2_engines: Path, version: str) -> None:
    assert_recorded(LTX2[version].name, Checkpoint.open(LTX2[version]), ltx2_engines / version)


def test_other_graphs_of_open_sora(open_sora_engines: Path) -> None:
    assert_recorded("open_sora", Checkpoint.open(OPEN_SORA), open_sora_engines)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_other_graphs_have_another_export_version(
    golden_engines: Callable[[FamilyCase], Path], case: FamilyCase
) -> None:
    assert_recorded(str(case), case.checkpoint, golden_engines(case))


def assert_recorded(name: str, checkpoint: Checkpoint, engines: Path) -> None:
    recorded: dict[str, Any] = json.loads(RECORD.read_text())
    if recorded["made_with"] != (here := {name: version(name).split("+")[0] for name in EXPORTERS}):
        pytest.skip(f"the graphs of {recorded['made_with']} are recorded, these are of {here}")
    now = {"export_version": export_version(checkpoint.family), "digest": digest_of(checkpoint, engines)}
    assert recorded["graphs"].get(name) == now, (
        "the graphs are others than those of the recorded export version: raise export_version of the family "
        "(or SHARED_EXPORT_VERSION), so that engines are built again, and record both in export_versions.json"
    )
