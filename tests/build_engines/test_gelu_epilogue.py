from __future__ import annotations

import pytest
import torch
from torch import nn

from stg_trt.build_engines.gelu_epilogue import fold_gelu
from stg_trt.build_engines.trace import trace
from stg_trt.models.segment import Segment
from tests.support.family_cases import COGVIDEOX, HUNYUAN_VIDEO, LTX, MOCHI, WAN, FamilyCase

# Feed-forwards of a block: one, or one per stream; Mochi's have a gate and no GELU.
TRACED = pytest.mark.slow(reason="traces a block of every family")
FOLDED = [
    (LTX, 1),
    pytest.param(WAN, 1, marks=TRACED),
    pytest.param(MOCHI, 0, marks=TRACED),
    pytest.param(HUNYUAN_VIDEO, 2, marks=TRACED),
    pytest.param(COGVIDEOX["2b"], 2, marks=TRACED),
]


@pytest.mark.parametrize(("case", "count"), FOLDED, ids=str)
def test_a_block_computes_the_same_with_another_gelu(case: FamilyCase, count: int) -> None:
    """On a CPU the operator has the erf GELU, which the module gets too, after the trace of the tanh one."""
    family, segment = case.family, Segment("block", 0, 1)
    module = family.module(case.checkpoint.load_transformer(segment.blocks), segment, expand_masks=False)
    specs = family.inputs(segment, case.workload), family.outputs(segment, case.workload)
    program = trace("block", module, *specs, 6).program
    assert fold_gelu(program) == count
    for part in module.modules():
        if getattr(part, "approximate", None) == "tanh":
            vars(part)["approximate"] = "none"
    for rows in (1, 3):
        inputs = family.trace_inputs(segment, case.workload, rows)
        outputs = [torch.zeros(spec.with_rows(rows)) for spec in specs[1]]
        with torch.no_grad():
            program.module()(*inputs, *outputs)
            expected = module(*inputs)
        for got, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


class Kept(nn.Module):
    """What is no tanh GELU of a product alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.plain = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read_twice = self.linear(x)
        erf = nn.functional.gelu(self.linear(x))
        without_bias = nn.functional.gelu(self.plain(x), approximate="tanh")
        tanh = nn.functional.gelu(read_twice, approximate="tanh")
        return torch.stack([erf, without_bias, read_twice, tanh])


def test_other_products_are_kept() -> None:
    module, x = Kept(), torch.randn(2, 3, 4)
    program = torch.export.export(module, (x,))
    assert fold_gelu(program) == 0
    torch.testing.assert_close(program.module()(x), module(x))
