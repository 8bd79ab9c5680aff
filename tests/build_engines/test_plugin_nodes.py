"""Graphs with nodes of our plugins: the nodes are there, and say what the eager model computes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from stg_trt import build
from stg_trt.build_engines.float32_graph import widen
from stg_trt.build_engines.onnx_compiler import open_session, session_runner
from stg_trt.build_engines.plugin_nodes import qk_norm_rope
from stg_trt.engines import tensorrt_library
from stg_trt.errors import BackendUnavailable, InvalidRequest
from stg_trt.models.segment import Segment
from tests.support.exported_graph import export_alone
from tests.support.family_cases import LTX, WITH_PLUGIN, FamilyCase

BACK = Segment("back", 2, 4, back=True)


@pytest.mark.slow(reason="exports a block of every family with the plugin")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", WITH_PLUGIN, ids=str)
def test_one_node_per_block_computes_the_same(case: FamilyCase, precision: str, tmp_path: Path) -> None:
    family, workload = case.family, replace(case.workload, precision=precision)
    module = family.module(case.checkpoint.load_transformer(), BACK, expand_masks=False)
    inputs = family.trace_inputs(BACK, case.workload, 3)
    expected = module(*inputs)[0]
    family.lower_precision(module, getattr(torch, workload.dtype))
    module.qk_norm_rope = qk_norm_rope
    export_alone(module, family.inputs(BACK, workload), tmp_path / "back.onnx", max_rows=3)
    graph = onnx.load(tmp_path / "back.onnx")
    assert Counter(node.op_type for node in graph.graph.node if node.domain == "stg_trt") == {"QKNormRope": 2}
    assert not graph.functions
    widen(graph)
    got = session_runner(open_session(graph), {})(dict(zip(module.inputs, inputs, strict=True)))[0]
    assert (got - expected).abs().max() <= (1e-5 if precision == "fp32" else 0.1)
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    ("plugins", "backend", "message"),
    [
        (["turbo"], "tensorrt-rtx", "plugins: expected some of qk_norm_rope for ltx-video, got turbo: leave"),
        (
            ["qk_norm_rope"],
            "onnxruntime",
            "plugins: expected the backend tensorrt or tensorrt-rtx for qk",
        ),
    ],
)
def test_plugins_that_a_build_cannot_use(
    plugins: list[str], backend: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        build(LTX.goldens, tmp_path / "engines", **LTX.sizes, backend=backend, plugins=plugins)
    assert not (tmp_path / "engines").exists()


def test_plugins_that_were_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_library, "PLUGINS", tmp_path / "none.so")
    with pytest.raises(BackendUnavailable, match=r"plugins: expected .*, got no such file: run make plugins"):
        build(
            LTX.goldens,
            tmp_path / "engines",
            **LTX.sizes,
            stg_blocks=[3],
            backend="tensorrt-rtx",
            plugins=["qk_norm_rope"],
        )
