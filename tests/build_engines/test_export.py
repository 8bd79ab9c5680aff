from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from stg_trt.build_engines import graph_weights
from stg_trt.build_engines.joined_graph import files_of
from stg_trt.engines.store import EngineRequest, EngineStore
from stg_trt.errors import GateMissed
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import engine_outputs
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from tests.support.exported_graph import export_alone
from tests.support.frozen_segments import BranchesOnRows, ViewsTwoRows

X = TensorSpec("x", "float32", (ROWS, 4, 6))
Y = TensorSpec("y", "float32", (ROWS, 4, 6))
TABLE = TensorSpec("table", "float32", (4, 6))


class Affine(SegmentModule):
    """y = x * table + weight."""

    def __init__(self) -> None:
        super().__init__(("x", "table"), ("x",), True)
        self.weight = nn.Parameter(torch.arange(24.0).view(4, 6))

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": tensors["x"] * tensors["table"] + self.weight}


def run(path: Path, feed: dict[str, Tensor]) -> list[np.ndarray]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})
    return results


@pytest.mark.parametrize("embedded_bytes", [0, 1 << 30], ids=["weights beside", "weights inside"])
def test_a_graph_runs_at_any_number_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded_bytes: int
) -> None:
    monkeypatch.setattr(graph_weights, "_EMBEDDED_BYTES", embedded_bytes)
    path, module = tmp_path / "affine.onnx", Affine().eval()
    export_alone(module, (X, TABLE), path)
    assert len(files_of(path)) == (2 if embedded_bytes == 0 else 1)
    assert set(files_of(path)) == set(tmp_path.iterdir())
    graph = onnx.load(path, load_external_data=False)
    assert [node.name for node in graph.graph.input] == ["x", "table"]
    assert [node.name for node in graph.graph.output] == ["next_x"]
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == 23
    for rows in (1, 2, 6):
        x, table = torch.randn(rows, 4, 6), torch.randn(4, 6)
        np.testing.assert_allclose(run(path, {"x": x, "table": table})[0], module(x, table)[0].detach())


@pytest.mark.parametrize("max_rows", [1, 6])
@pytest.mark.parametrize(
    ("module", "specs"),
    [(ViewsTwoRows(("x",), ("out",), True), (X,)), (BranchesOnRows(("x", "y"), ("out",), True), (X, Y))],
    ids=["view", "branch"],
)
def test_frozen_rows_are_named(
    tmp_path: Path, module: SegmentModule, specs: tuple[TensorSpec, ...], max_rows: int
) -> None:
    message = r"seg: expected x of shape \('rows', 4, 6\), got \[2, 4, 6\]: an operation in the segment fixes"
    with pytest.raises(GateMissed, match=message):
        export_alone(module, specs, tmp_path / "seg.onnx", max_rows=max_rows)


def test_the_exporter_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_alone(Affine().eval(), (X, TABLE), tmp_path / "affine.onnx")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["front", "block_1", "mid_2_2", "back"])
@pytest.mark.parametrize("rows", [1, 6])
def test_segments_of_a_model_are_their_modules(
    ltx_engines: Path, ltx_checkpoint: Path, name: str, rows: int
) -> None:
    """The exported graphs of the shared engines, at row counts that were not traced."""
    build = EngineStore.open(ltx_engines).find(EngineRequest(layout="segmented"))
    record, checkpoint = build.manifest.record(name), Checkpoint.open(ltx_checkpoint)
    assert record is not None
    family, workload = checkpoint.family, build.manifest.workload
    module = family.module(checkpoint.load_transformer(), record.segment, expand_masks=True)
    inputs = family.trace_inputs(record.segment, workload, rows)
    with torch.no_grad():
        expected = module(*inputs)
    got = run(build.folder / record.files[0].name, dict(zip(module.inputs, inputs, strict=True)))
    assert len(got) == len(engine_outputs(module.inputs, module.outputs))
    for found, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
