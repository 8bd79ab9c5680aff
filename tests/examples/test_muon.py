"""The example's Muon: torch's, in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from examples.moving_shapes.muon import Muon, orthogonalise

SHAPES = ((8, 8), (8, 8), (24, 8), (8, 32))


def make_params() -> list[nn.Parameter]:
    """Matrices of some shapes."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_a_few_steps_are_those_of_torch_up_to_bfloat16() -> None:
    ours, theirs, start = make_params(), make_params(), make_params()
    optimizers: list[torch.optim.Optimizer] = [
        Muon(ours, lr=0.1, weight_decay=0.01),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, first in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() < 0.05 * (other - first).norm()


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 24, 8), (2, 8, 32)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
    assert values.shape == (2, 8)
    assert ((values > 0.3) & (values < 1.3)).all()


def test_a_state_goes_on() -> None:
    def run(stop: bool) -> Tensor:
        param = make_params()[0]
        optimizer = Muon([param], lr=0.1)
        for step in range(4):
            if stop and step == 2:
                kept, optimizer = optimizer.state_dict(), Muon([param], lr=0.1)
                optimizer.load_state_dict(kept)
            param.grad = torch.full_like(param, float(step)) + param.detach()
            optimizer.step()
        return param.detach()

    assert torch.equal(run(stop=True), run(stop=False))
