"""Builds an engine of a small graph around the plugin, without a GPU, and prints whether that worked."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from stg_trt.engines.tensorrt_library import load_library

TOKENS, CHANNELS = 10, 64


def graph(dtype: int, group: int, weight: int, pairs: int, eps: dict[str, float]) -> onnx.ModelProto:
    """q and k by projection, the node, and an elementwise product; the rows are dynamic."""
    random = np.random.default_rng(0)

    def constant(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(random.standard_normal(shape, dtype=np.float32), name)

    def value(name: str, element: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, element, shape)

    plugin = {"plugin_namespace": "stg_trt", "plugin_version": "2", "group": group}
    nodes = [
        *(helper.make_node("Cast", [f"{side}_projection"], [f"{side}_w"], to=dtype) for side in "qk"),
        *(helper.make_node("MatMul", ["x", f"{side}_w"], [side]) for side in "qk"),
        helper.make_node(
            "QKNormRope",
            ["q", "k", "q_weight", "k_weight", "cos", "sin"],
            ["q_out", "k_out"],
            domain="stg_trt",
            **plugin,
            **eps,
        ),
        helper.make_node("Mul", ["q_out", "k_out"], ["y"]),
    ]
    inputs = [
        value("x", dtype, "rows", TOKENS, CHANNELS),
        *(value(name, TensorProto.FLOAT, TOKENS, pairs) for name in ("cos", "sin")),
    ]
    constants = [constant(f"{side}_projection", CHANNELS, CHANNELS) for side in "qk"]
    constants += [constant(f"{side}_weight", weight) for side in "qk"]
    outputs = [value("y", dtype, "rows", TOKENS, CHANNELS)]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("stg_trt", 1)]
    made = helper.make_graph(nodes, "plugin", inputs, outputs, constants)
    return helper.make_model(made, opset_imports=opsets)


def build(plugins: Path, model: onnx.ModelProto) -> bytes | None:
    """The engine for rows 1 to 3 on SM 8.9, or None."""
    trt = load_library("tensorrt-rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    assert trt.get_plugin_registry().load_library(str(plugins)) is not None
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if not trt.OnnxParser(network, logger).parse(model.SerializeToString()):
        return None
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *((rows, TOKENS, CHANNELS) for rows in (1, 2, 3)))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plugins", type=Path)
    parser.add_argument("--dtype", default="BFLOAT16")
    parser.add_argument("--group", type=int, default=0)
    parser.add_argument("--weight", type=int)
    parser.add_argument("--pairs", type=int, default=CHANNELS // 2)
    parser.add_argument("--no-eps", action="store_true")
    given = parser.parse_args()
    weight = given.weight or given.group or CHANNELS
    eps = {} if given.no_eps else {"eps": 1e-6}
    model = graph(TensorProto.DataType.Value(given.dtype), given.group, weight, given.pairs, eps)
    plan = build(given.plugins, model)
    print(
        "no engine" if plan is None else f"engine {'with' if b'QKNormRope' in plan else 'without'} QKNormRope"
    )


if __name__ == "__main__":
    main()
