from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto

from stg_trt.build_engines.float32_graph import write_float32_graph
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import cut
from stg_trt.models.workload import Workload
from tests.support.exported_graph import export_alone

WORKLOAD = Workload(128, 160, 17, text_length=9, precision="bf16")
ROWS = 3
SLOW_FIXTURES = {"graphs": "exports a block with the head in bfloat16"}


@pytest.fixture(scope="module")
def module(ltx_checkpoint: Path) -> SegmentModule:
    """Block 3 with the head, in bfloat16: masked cross-attention, float32 islands, both in one."""
    checkpoint = Checkpoint.open(ltx_checkpoint)
    segment = cut("segmented", 5, "stg-a", (3,))[-1]
    made = checkpoint.family.module(checkpoint.load_transformer(), segment, expand_masks=False).eval()
    checkpoint.family.lower_precision(made, torch.bfloat16)
    return made


@pytest.fixture(scope="module")
def graphs(
    module: SegmentModule, ltx_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The bfloat16 graph, and the widened one."""
    folder = tmp_path_factory.mktemp("write_float32_graph")
    narrow, wide = folder / "back.onnx", folder / "back.float32.onnx"
    family, segment = Checkpoint.open(ltx_checkpoint).family, cut("segmented", 5, "stg-a", (3,))[-1]
    export_alone(module, family.inputs(segment, WORKLOAD), narrow, max_rows=6)
    write_float32_graph(narrow, wide)
    return narrow, wide


def types(path: Path) -> set[int]:
    """Element types of everything in a graph."""
    graph = onnx.load(path).graph
    infos = (*graph.input, *graph.output, *graph.value_info)
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    return {
        *(info.type.tensor_type.elem_type for info in infos),
        *(initializer.data_type for initializer in graph.initializer),
        *(attribute.i for attribute in attributes if attribute.name in ("to", "dtype")),
        *(attribute.t.data_type for attribute in attributes if attribute.HasField("t")),
    }


def test_nothing_stays_bfloat16(graphs: tuple[Path, Path]) -> None:
    narrow, wide = graphs
    assert TensorProto.BFLOAT16 in types(narrow) and TensorProto.FLOAT in types(narrow)
    assert TensorProto.BFLOAT16 not in types(wide)
    onnx.checker.check_model(wide)


def test_the_graph_is_otherwise_the_same(graphs: tuple[Path, Path]) -> None:
    narrow, wide = (onnx.load(path).graph for path in graphs)
    added = [node for node in wide.node if node.op_type == "Add" and node.output[0].endswith("_mask")]
    assert [n.op_type for n in wide.node if n not in added] == [n.op_type for n in narrow.node]
    masked = [node for node in narrow.node if node.op_type == "Attention" and len(node.input) > 3]
    assert len(added) == len([node for node in masked if node.input[3]]) == 1


def test_the_widened_graph_is_the_float32_module(
    graphs: tuple[Path, Path], module: SegmentModule, ltx_checkpoint: Path
) -> None:
    family = Checkpoint.open(ltx_checkpoint).family
    segment = cut("segmented", 5, "stg-a", (3,))[-1]
    traced = family.trace_inputs(segment, WORKLOAD, ROWS)
    inputs = [tensor.float() if tensor.is_floating_point() else tensor for tensor in traced]
    with torch.no_grad():
        (expected,) = module.float()(*inputs)
    session = ort.InferenceSession(graphs[1], providers=["CPUExecutionProvider"])
    feed = {name: tensor.numpy() for name, tensor in zip(module.inputs, inputs, strict=True)}
    (got,) = session.run(None, feed)
    assert (torch.from_numpy(got) - expected).norm() / expected.norm() <= 1e-5
