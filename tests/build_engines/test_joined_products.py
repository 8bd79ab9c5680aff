from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stg_trt.build_engines.trace import Trace, trace
from stg_trt.build_engines.weights import weights_of
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from tests.support.family_cases import COGVIDEOX, HUNYUAN_VIDEO, LTX, MOCHI, WAN, FamilyCase

MAX_ROWS = 6
BLOCK, SINGLE = Segment("block", 0, 1), Segment("block", 4, 5)
SKIPPED = Segment("block", 0, 1, skipped=Perturbation("stg-a", (0,)))
X = TensorSpec("x", "float32", (ROWS, 4, 6))
SELF = ("to_q", "to_k", "to_v")
VALUES_FIRST = ("to_v", "to_q", "to_k")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj")

# Of a block, the linears that become one, in the order of the program. In a skipped one only the values of
# the self-attention are left. CogVideoX's streams share their weights; HunyuanVideo's single blocks have one
# more linear of the same input, whose GELU is worth more.
TRACED = pytest.mark.slow(reason="traces a block of every family")
JOINED = [
    pytest.param(LTX, BLOCK, {VALUES_FIRST, ("to_k", "to_v")}, id="ltx"),
    pytest.param(LTX, SKIPPED, {("to_k", "to_v")}, id="ltx skipped"),
    pytest.param(WAN, BLOCK, {VALUES_FIRST, ("to_k", "to_v")}, id="wan", marks=TRACED),
    pytest.param(MOCHI, BLOCK, {SELF, TEXT}, id="mochi", marks=TRACED),
    pytest.param(HUNYUAN_VIDEO, BLOCK, {SELF, TEXT}, id="hunyuan double", marks=TRACED),
    pytest.param(HUNYUAN_VIDEO, SINGLE, {SELF}, id="hunyuan single", marks=TRACED),
    pytest.param(COGVIDEOX["2b"], BLOCK, {SELF}, id="cogvideox", marks=TRACED),
]


def traced(case: FamilyCase, segment: Segment) -> tuple[SegmentModule, Trace]:
    family = case.family
    module = family.module(case.checkpoint.load_transformer(segment.blocks), segment, expand_masks=False)
    borders = family.inputs(segment, case.workload), family.outputs(segment, case.workload)
    return module, trace("block", module, *borders, MAX_ROWS)


def linears_joined(module: SegmentModule, joined: Mapping[str, tuple[str, ...]]) -> set[tuple[str, ...]]:
    """The last names of the linears whose weights, and biases if they have them, are joined."""
    names = [name for name, _ in weights_of(module)]
    return {tuple(names[int(part[1:])].split(".")[-2] for part in parts) for parts in joined.values()}


@pytest.mark.parametrize(("case", "segment", "wanted"), JOINED)
def test_a_block_computes_the_same_with_fewer_products(
    case: FamilyCase, segment: Segment, wanted: set[tuple[str, ...]]
) -> None:
    module, found = traced(case, segment)
    assert linears_joined(module, found.joined) == wanted
    found.program.validate()  # type: ignore[no-untyped-call]
    for rows in (1, 3):
        inputs = case.family.trace_inputs(segment, case.workload, rows)
        outputs = [
            torch.full(spec.with_rows(rows), torch.nan)
            for spec in case.family.outputs(segment, case.workload)
        ]
        with torch.no_grad():
            found.program.module()(*inputs, *outputs)
            expected = module(*inputs)
        for got, result in zip(outputs, expected, strict=True):
            torch.testing.assert_close(got, result, rtol=1e-5, atol=1e-5)


def test_another_block_has_its_own_weights_in_the_same_order() -> None:
    _, found = traced(LTX, BLOCK)
    other = LTX.family.module(
        LTX.checkpoint.load_transformer((2,)), Segment("block", 2, 3), expand_masks=False
    )
    given, weights = found.weights_of(other), dict(weights_of(other))
    assert given.keys() == found.reads
    (name,) = (name for name, parts in found.joined.items() if len(parts) == 3 and given[name].ndim == 2)
    stacked = [weights[f"blocks.2.attn1.{linear}.weight"] for linear in VALUES_FIRST]
    torch.testing.assert_close(given[name], torch.cat(stacked), rtol=0, atol=0)


class Kept(SegmentModule):
    """Linears of one input, none of which can be joined with another."""

    def __init__(self) -> None:
        super().__init__(("x",), ("x",), False)
        self.with_bias, self.without = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.read_twice = nn.Parameter(torch.eye(6))
        self.before_gelu = nn.Linear(6, 6)

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        x = tensors["x"]
        twice = functional.linear(x, self.read_twice) + self.read_twice.sum()
        gelu = functional.gelu(self.before_gelu(x), approximate="tanh")
        return {"x": self.with_bias(x) + self.without(x) + twice + gelu}


def test_other_linears_are_kept() -> None:
    found = trace("kept", Kept(), (X,), (X,), MAX_ROWS)
    assert not found.joined and len(found.reads) == 6
