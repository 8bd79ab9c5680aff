"""The weights of a module, in an order that is the same for modules which differ in their values alone."""

from __future__ import annotations

from torch import Tensor, nn


def weights_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers with their names; one that has two names has the first."""
    named = (*module.named_parameters(), *module.named_buffers())
    return [(name, tensor.detach().contiguous()) for name, tensor in named]
