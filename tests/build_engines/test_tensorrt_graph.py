"""The timesteps of tokens in TensorRT's graphs: chosen from a table of a few, not looked up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from stg_trt.build_engines.tensorrt_graph import MOST_ENTRIES, choose_entries
from stg_trt.engines.store import EngineStore
from tests.support.family_cases import LTX, FamilyCase

ROWS, TOKENS = 3, 50


def lookup(entries: int, axis: int = 1) -> ir.Model:
    """Of (rows, entries, channels) by an index of the tokens."""
    shape = f"R,{TOKENS},8" if axis == 1 else f"{TOKENS},{entries},8"
    text = f"""
        <ir_version: 10, opset_import: ["" : 23]>
        lookup (float[R,{entries},8] table, int64[{TOKENS}] index) => (float[{shape}] y)
        {{
            doubled = Add (table, table)
            y_ = Gather <axis = {axis}> (doubled, index)
            y = Neg (y_)
        }}
    """
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    made: ir.Model = ir.from_proto(model)
    return made


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> np.ndarray:
    serialized = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, feed)[0]
    return result


@pytest.mark.parametrize("entries", [2, 4])
def test_every_token_has_the_entry_of_its_place(entries: int) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((ROWS, entries, 8), np.float32)
    feed: dict[str, np.ndarray] = {"table": table, "index": rng.integers(entries, size=TOKENS)}
    model = lookup(entries)
    wanted = run(model, feed)
    assert choose_entries(model.graph) == 1
    RemoveUnusedNodesPass()(model)
    kinds = {node.op_type for node in model.graph}
    assert "Gather" not in kinds and np.array_equal(run(model, feed), wanted)


@pytest.mark.parametrize("kept", [lookup(1), lookup(MOST_ENTRIES + 1), lookup(4, axis=0)])
def test_other_lookups_are_kept(kept: ir.Model) -> None:
    assert choose_entries(kept.graph) == 0


def test_all_lookups_of_a_model_are_found(golden_engines: Callable[[FamilyCase], Path]) -> None:
    """Six in each block, and two in the head; those of a piece share their comparisons."""
    build = next(one for one in EngineStore.open(golden_engines(LTX)).builds if one.manifest.layout == "twin")
    (record,) = (one for one in build.manifest.segments if one.segment.name == "normal")
    model = ir.load(build.folder / record.files[0].name)
    assert choose_entries(model.graph) == 6 * LTX.family.num_blocks + 2
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    kinds = [node.op_type for node in model.graph]
    assert (kinds.count("Gather"), kinds.count("Equal")) == (0, 3 * (LTX.family.num_blocks + 1))
