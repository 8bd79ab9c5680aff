"""ONNX graphs whose calls do not come back by themselves."""

from __future__ import annotations

import math
from unittest import mock

import onnx
from onnx import TensorProto, helper

from stg_trt.build_engines.export import PieceGraph
from stg_trt.build_engines.onnx_compiler import OnnxCompiler
from stg_trt.cli.main import main

NEVER = 1 << 50


def loop_after(model: onnx.ModelProto, switch: str, *, below: float) -> None:
    """Passes the first output through a loop, endless if the largest element of `switch` is lower."""
    graph = model.graph
    output = graph.output[0].name
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == output:
                    names[place] = f"{output}_before"
    dtype = graph.output[0].type.tensor_type.elem_type
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Abs", ["x"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", dtype, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", dtype, None),
        ],
    )
    for name, kind, value in (
        ("loop_below", TensorProto.FLOAT, below),
        ("loop_never", TensorProto.INT64, NEVER),
        ("loop_none", TensorProto.INT64, 0),
    ):
        graph.initializer.append(helper.make_tensor(name, kind, [], [value]))
    graph.node.extend(
        [
            helper.make_node("ReduceMax", [switch], ["loop_switch"], keepdims=0),
            helper.make_node("Less", ["loop_switch", "loop_below"], ["loop_on"]),
            helper.make_node("Where", ["loop_on", "loop_never", "loop_none"], ["loop_trips"]),
            helper.make_node("Loop", ["loop_trips", "", f"{output}_before"], [output], body=body),
        ]
    )


def stg_trt_with_an_endless_gate() -> None:
    """`stg-trt` whose gate runs graphs that have been given a loop without end."""

    runnable = OnnxCompiler._runnable

    def endless(compiler: OnnxCompiler, piece: PieceGraph) -> onnx.ModelProto:
        model = runnable(compiler, piece)
        loop_after(model, model.graph.input[0].name, below=math.inf)
        return model

    with mock.patch.object(OnnxCompiler, "_runnable", endless):
        main()
