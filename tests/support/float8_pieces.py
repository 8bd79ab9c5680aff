"""One FP8 block of a tiny model: its module, its graph, and a session on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import onnx_ir as ir
import torch
from torch import Tensor, nn

from stg_trt.build_engines.calibration import converting, watch_input
from stg_trt.build_engines.export import PieceGraph, export, weight_name
from stg_trt.build_engines.float8_linear import Float8Linear
from stg_trt.build_engines.float32_graph import widen
from stg_trt.build_engines.onnx_compiler import fed_weights, open_session, session_runner
from stg_trt.build_engines.weights import weights_of
from stg_trt.engines.float8_record import Float8Record
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import Segment
from tests.support.family_cases import FamilyCase

ROWS = 2


@dataclass(frozen=True, eq=False)
class Float8Piece:
    """`inputs` are random, by name, in float32."""

    module: SegmentModule
    graph: PieceGraph
    inputs: dict[str, Tensor]

    @property
    def layers(self) -> dict[str, Float8Linear]:
        """The FP8 layers by name."""
        return {n: layer for n, layer in self.module.named_modules() if isinstance(layer, Float8Linear)}

    def values_input(self, layer: str) -> str:
        """The graph's input that a layer's FP8 values are."""
        names = [name for name, _ in weights_of(self.module)]
        return weight_name(names.index(f"{layer}.values"))

    def run(self, extra: tuple[str, ...] = ()) -> list[Tensor]:
        """The outputs in ONNX Runtime, and then some values inside of the graph."""
        graph = self.graph.graph.clone()
        named = {output.name: output for node in graph for output in node.outputs}
        graph.outputs.extend(named[name] for name in extra)
        model = ir.to_proto(ir.Model(graph, ir_version=self.graph.ir_version))
        widen(model)
        return session_runner(open_session(model), fed_weights(self.module))(self.inputs)


@cache
def float8_block(case: FamilyCase, precision: str) -> Float8Piece:
    """Block 1, all of whose layers that the family's rule takes are FP8."""
    family = case.family
    workload = replace(case.workload, precision=precision)
    segment = Segment("block", 1, 2)
    module = family.module(case.checkpoint.load_transformer([1]), segment, expand_masks=True).eval()
    specs = family.inputs(segment, workload)
    generator = torch.Generator().manual_seed(0)
    tensors = {spec.name: spec.random(ROWS, generator) for spec in specs}
    inputs = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    record = Float8Record(
        prompts=None,
        num_steps=1,
        kept_blocks=(),
        largest_inputs=largest_inputs(case, module, inputs),
        steps=(),
        segments={},
    )
    converting(record, ("transformer",))(segment, module)
    family.lower_precision(module, getattr(torch, workload.dtype))
    graph = export("block", module, specs, opset=23, max_rows=1024)
    module.float()
    return Float8Piece(module, graph, inputs)


@torch.no_grad()
def largest_inputs(case: FamilyCase, module: SegmentModule, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Of the layers that the family's rule takes, by their names in a record, for these inputs."""
    rule = case.family.float8
    assert rule is not None
    largest: dict[str, float] = {}

    linears = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    handles = [
        module.get_submodule(name).register_forward_pre_hook(watch_input(f"transformer.{name}", largest))
        for name in linears
        if rule.takes(name, ())
    ]
    module(*inputs.values())
    for handle in handles:
        handle.remove()
    return largest
