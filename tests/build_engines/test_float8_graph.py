"""FP8 graphs: which products have Q and DQ, and what ONNX Runtime makes of them."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from stg_trt.build_engines.compiler import FLOAT8
from stg_trt.build_engines.float8_graph import share_quantizers
from stg_trt.build_engines.verify import distance
from tests.support.family_cases import COGVIDEOX, HUNYUAN_VIDEO, LTX, MOCHI, WAN, FamilyCase
from tests.support.float8_pieces import Float8Piece, float8_block

SLOW = pytest.mark.slow(reason="exports an FP8 block of every family, in two precisions")
# Those with the most different blocks.
CASES = (LTX, *(pytest.param(case, marks=SLOW) for case in (WAN, MOCHI, HUNYUAN_VIDEO, COGVIDEOX["5b"])))


def producer(value: ir.Value | None, op_type: str) -> ir.Node:
    node = value.producer() if value is not None else None
    assert node is not None and node.op_type == op_type, (value, node and node.op_type, op_type)
    return node


def name_of(value: ir.Value | None) -> str:
    assert value is not None and value.name is not None
    return value.name


def products_of(piece: Float8Piece, layer: str) -> list[tuple[ir.Node, ir.Node]]:
    """The products of a layer with the nodes that quantise their inputs; asserts all that is between.

    CogVideoX applies a layer to the video and to the text.
    """
    (values,) = (value for value in piece.graph.graph.inputs if value.name == piece.values_input(layer))
    assert values.dtype == ir.DataType.FLOAT8E4M3FN
    ((dequantized, _),) = values.uses()
    assert dequantized.op_type == "DequantizeLinear" and dequantized.attributes["axis"].as_int() == 0
    ((transposed, _),) = dequantized.outputs[0].uses()
    assert transposed.op_type == "Transpose"
    products = []
    for product, place in transposed.outputs[0].uses():
        assert product.op_type in ("MatMul", "Gemm") and place == 1
        quantized = producer(producer(product.inputs[0], "DequantizeLinear").inputs[0], "QuantizeLinear")
        products.append((product, quantized))
    return products


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=SLOW), "fp8"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_chosen_product_is_quantised_and_no_other(case: FamilyCase, precision: str) -> None:
    """With `fp8`, what is around the products is bfloat16."""
    piece = float8_block(case, precision)
    rule = case.family.float8
    assert rule is not None and len(piece.layers) > 5
    assert all(rule.takes(layer, ()) for layer in piece.layers)
    products = {product for layer in piece.layers for product, _ in products_of(piece, layer)}
    for node in piece.graph.graph:
        if node.op_type in ("MatMul", "Gemm") and node not in products:
            makers = [source.producer() for source in node.inputs if source is not None]
            assert not any(maker and maker.op_type == "DequantizeLinear" for maker in makers)
    kinds = [node.op_type for node in piece.graph.graph]
    assert kinds.count("QuantizeLinear") == len(products)
    assert kinds.count("DequantizeLinear") == len(products) + len(piece.layers)


@pytest.mark.slow(reason="exports an FP8 block of every family in float32")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_product_is_pytorchs(case: FamilyCase) -> None:
    """Each layer on the input that ONNX Runtime gives it: rounding in the layers before cannot hide it."""
    piece = float8_block(case, "fp32")
    places = [
        (linear, product.op_type, name_of(quantized.inputs[0]), name_of(product.outputs[0]))
        for layer, linear in piece.layers.items()
        for product, quantized in products_of(piece, layer)
    ]
    inside = sorted({name for place in places for name in place[2:]} - {*piece.inputs})
    results = piece.run(tuple(inside))
    found = {**piece.inputs, **dict(zip(inside, results[-len(inside) :], strict=True))}
    for linear, op_type, x, y in places:
        wanted = linear(found[x])
        if linear.bias is not None and op_type == "MatMul":
            wanted = wanted - linear.bias
        assert (found[y] - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_block_is_pytorchs(case: FamilyCase) -> None:
    piece = float8_block(case, "fp8")
    with torch.no_grad():
        expected = piece.module(*piece.inputs.values())
    assert FLOAT8.allows(distance(expected, piece.run()))


def graph_of_two(scales: tuple[float, float]) -> tuple[ir.Graph, list[ir.Node]]:
    """Two layers quantise one input."""
    x = ir.Value(name="x", shape=ir.Shape([2, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, constants = [], []
    for place, scale in enumerate(scales):
        value = ir.val(f"scale_{place}", const_value=ir.tensor(torch.tensor(scale).numpy()))
        constants.append(value)
        quantized = ir.Node("", "QuantizeLinear", [x, value], attributes=[ir.AttrInt64("output_dtype", 17)])
        nodes += [quantized, ir.Node("", "DequantizeLinear", [quantized.outputs[0], value])]
    graph = ir.Graph([x], [node.outputs[0] for node in nodes[1::2]], nodes=nodes, initializers=constants)
    return graph, nodes


def test_layers_of_one_input_and_scale_share_its_quantisation() -> None:
    graph, nodes = graph_of_two((0.5, 0.5))
    graph.outputs.pop()
    graph.outputs.append(ir.Node("", "Identity", [nodes[3].outputs[0]]).outputs[0])
    graph.append(graph.outputs[1].producer())  # type: ignore[arg-type]
    assert share_quantizers(graph) == 2
    assert [node.op_type for node in graph] == ["QuantizeLinear", "DequantizeLinear", "Identity"]


def test_other_scales_stay_apart() -> None:
    graph, nodes = graph_of_two((0.5, 0.25))
    assert share_quantizers(graph) == 0
    assert [*graph] == nodes
