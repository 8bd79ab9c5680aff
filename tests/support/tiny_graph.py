"""A graph of one matrix product, for tests that need an engine file and no model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from stg_trt.models.tensor_spec import ROWS, TensorSpec

INPUT = TensorSpec("prompt_embeds", "float32", (ROWS, 9, 24))
OUTPUT = TensorSpec("text", "float32", (ROWS, 9, 32))


def write_graph(path: Path, tokens: int = 9) -> Path:
    """Projects a prompt, as a family's text segment does."""
    weight = np.random.default_rng(0).standard_normal((24, 32)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", [INPUT.name, "weight"], [OUTPUT.name])],
        path.stem,
        *(
            [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, (ROWS, tokens, spec.shape[2]))]
            for spec in (INPUT, OUTPUT)
        ),
        [numpy_helper.from_array(weight, "weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


def write_attentions(path: Path, count: int) -> Path:
    """Self-attentions, one after the other."""
    names = [INPUT.name, *(f"attended_{place}" for place in range(1, count)), OUTPUT.name]
    nodes = [
        helper.make_node("Attention", [read] * 3, [written], f"node_{written}", q_num_heads=3, kv_num_heads=3)
        for read, written in pairwise(names)
    ]
    ends = (helper.make_tensor_value_info(name, TensorProto.FLOAT, INPUT.shape) for name in names[::count])
    graph = helper.make_graph(nodes, path.stem, *([end] for end in ends))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), path)
    return path


def tensors(rows: int) -> dict[str, Tensor]:
    """An input, and memory for its output."""
    return {INPUT.name: torch.randn(INPUT.with_rows(rows)), OUTPUT.name: torch.zeros(OUTPUT.with_rows(rows))}
