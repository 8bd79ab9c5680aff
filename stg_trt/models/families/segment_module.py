"""A segment as a module with named inputs and outputs, which is what compilers are given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

Pair = tuple[Tensor, Tensor]
QKNormRope = Callable[[Tensor, Tensor, Pair, Pair, float], Pair]
"""Of queries, keys, their norms' weights, cosines and sines of the positions, and eps."""


class SegmentModule(nn.Module):
    """A segment with named inputs and outputs, called with tensors in the order of the names."""

    def __init__(self, inputs: tuple[str, ...], outputs: tuple[str, ...], expand_masks: bool) -> None:
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs
        # ONNX Runtime's CPU attention wants masks of (rows, 1, queries, keys); others want them unexpanded.
        self.expand_masks = expand_masks
        # Replaces norm and rotation of queries and keys if a TensorRT plugin computes them.
        self.qk_norm_rope: QKNormRope | None = None
        # Kernels that take masks want their rows aligned: keys under a mask are padded to a multiple of this.
        self.masked_keys_multiple = 1

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = self.run(dict(zip(self.inputs, tensors, strict=True)))
        return tuple(results[name] for name in self.outputs)

    def run(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The segment's outputs by name."""
        raise TypeError(f"{type(self).__name__} does not define run")

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """softmax(scale*QK^T + bias)V over (rows, heads, tokens, d), with an additive mask over keys.

        The default of `scale` is 1/sqrt(d).
        """
        if bias is not None and (padding := -key.shape[2] % self.masked_keys_multiple):
            key, value = (functional.pad(tensor, (0, 0, 0, padding)) for tensor in (key, value))
            bias = functional.pad(bias, (0, padding), value=-torch.inf)
        if bias is not None and self.expand_masks:
            bias = bias.expand(-1, -1, query.shape[2], -1)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
