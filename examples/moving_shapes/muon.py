"""Muon: momentum whose update of a matrix is orthogonalised, so that all its directions grow alike.

torch.optim.Muon does this in bfloat16, one matrix at a time. Most CPUs have to emulate bfloat16: there it
takes seconds for the matrices of this example. This one works in float32, on all matrices of a shape at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Of the quintic of Keller Jordan's Muon: it takes singular values to about 1 in five steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum; its steps are as large as AdamW's at the same learning rate."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__([*params], {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every matrix that has a gradient."""
        assert closure is None, "a loss is not evaluated again"
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[param.shape].append(param)
            for shape, params in by_shape.items():
                gradients = [self._averaged(param, group["momentum"]) for param in params]
                updates = orthogonalise(torch.stack(gradients))
                # Moonshot's scale: the root mean square of AdamW's updates is about 0.2.
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, [*updates], alpha=-size)

    def _averaged(self, param: Tensor, momentum: float) -> Tensor:
        """The gradient with Nesterov momentum."""
        gradient, state = param.grad, self.state[param]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
        average: Tensor = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return torch.lerp(gradient, average, momentum)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices to a stack of them [matrix, row, column], by Newton-Schulz."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
