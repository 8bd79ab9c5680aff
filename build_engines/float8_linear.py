"""Linear layers in FP8 (E4M3): in PyTorch what standard QuantizeLinear and DequantizeLinear nodes compute.

An input has one scale, measured by calibration; each output channel of a weight has its own. Scales are
bfloat16 numbers, rounded up, so that they are the same in graphs of both precisions and nothing saturates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
# What a layer's input is divided by if calibration has seen nothing but zeros.
_LEAST_SCALE = 2.0**-20
# Of the nodes; later opsets have the same.
_OPSET = 23


class Float8Linear(nn.Module):
    """A linear layer over FP8 products; `largest_input` is the largest absolute input that it is made for.

    Larger ones become the largest FP8 number. In float32 the results are those of ONNX Runtime.
    """

    values: Tensor
    zero: Tensor

    def __init__(self, linear: nn.Linear, largest_input: float) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = scale_of(weight.abs().amax(1))
        # As buffers, since precision is lowered in parameters alone.
        self.register_buffer("values", _rounded(weight / scales[:, None]))
        self.register_buffer("zero", torch.zeros((), dtype=_E4M3))
        self.weight_scale = nn.Parameter(scales, requires_grad=False)
        self.input_scale = nn.Parameter(scale_of(torch.tensor(largest_input)), requires_grad=False)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """(channels out, channels in), as the values and their scales say."""
        return _dequantized(self.values, self.weight_scale, axis=0)

    def forward(self, x: Tensor) -> Tensor:
        quantized = _quantized(x, self.input_scale, self.zero)
        return F.linear(_dequantized(quantized, self.input_scale), self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves and casts the rest; the values stay FP8, whatever the module is cast to."""
        super()._apply(fn, recurse)
        self.values, self.zero = self.values.to(_E4M3), self.zero.to(_E4M3)
        return self


def scale_of(largest: Tensor) -> Tensor:
    """What numbers up to `largest` are divided by to be FP8: a bfloat16 number, in float32."""
    exact = (largest.float() / _LARGEST).clamp(min=_LEAST_SCALE)
    # The next bfloat16 number: bits that it does not have are rounded up.
    return ((exact.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _rounded(x: Tensor) -> Tensor:
    """To the nearest FP8 number; torch makes NaN of what is too large, ONNX the largest."""
    return x.clamp(-_LARGEST, _LARGEST).to(_E4M3)


def _quantized(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    if not torch.compiler.is_exporting():
        return _rounded(x.float() / scale.float())
    return torch.onnx.ops.symbolic(
        "QuantizeLinear", (x, scale, zero), dtype=_E4M3, shape=x.shape, version=_OPSET
    )


def _dequantized(x: Tensor, scale: Tensor, axis: int | None = None) -> Tensor:
    """In the dtype of the scale, of which there is one for all of `x`, or for each place along an axis."""
    if not torch.compiler.is_exporting():
        factors = scale if axis is None else scale.unflatten(0, (-1, *[1] * (x.ndim - axis - 1)))
        return (x.float() * factors.float()).to(scale.dtype)
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (x, scale),
        {} if axis is None else {"axis": axis},
        dtype=scale.dtype,
        shape=x.shape,
        version=_OPSET,
    )
