"""FP8 layers in PyTorch: their scales, and what stays FP8 when a module is cast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stg_trt.build_engines.float8_linear import Float8Linear, scale_of

E4M3 = torch.float8_e4m3fn


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 24)


def test_scales_are_bfloat16_numbers_that_nothing_saturates() -> None:
    largest = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 100 + 0.01
    scales = scale_of(largest)
    assert torch.equal(scales, scales.bfloat16().float())
    assert ((largest / scales) <= 448).all()
    # The next smaller bfloat16 number would be too small.
    smaller = (scales.bfloat16().view(torch.int16) - 1).view(torch.bfloat16).float()
    assert ((largest / smaller) > 448).all()


def test_a_bfloat16_number_stays_what_it_is() -> None:
    assert scale_of(torch.tensor(448.0)) == 1


def test_a_layer_that_saw_zeros_alone_has_a_scale(linear: nn.Linear) -> None:
    layer = Float8Linear(linear, 0.0)
    assert layer.input_scale > 0
    assert torch.equal(layer(torch.zeros(2, 48)), linear.bias.expand(2, -1))


def test_the_product_is_that_of_rounded_numbers(linear: nn.Linear) -> None:
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    layer = Float8Linear(linear, float(x.abs().max()))
    scales = scale_of(linear.weight.detach().abs().amax(1))[:, None]
    weight = (linear.weight.detach() / scales).to(E4M3).float() * scales
    rounded = (x / layer.input_scale).to(E4M3).float() * layer.input_scale
    assert torch.equal(layer(x), nn.functional.linear(rounded, weight, linear.bias))
    error = (layer(x) - linear(x)).norm() / linear(x).norm()
    assert 0.01 < error < 0.06


def test_larger_inputs_than_calibration_saw_become_the_largest_number(linear: nn.Linear) -> None:
    layer = Float8Linear(linear, 1.0)
    largest = float(layer.input_scale) * 448
    assert torch.equal(layer(torch.full((1, 48), 9.0)), layer(torch.full((1, 48), largest)))
    assert layer(torch.full((1, 48), -1e9)).isfinite().all()


def test_values_stay_fp8_and_exact_whatever_the_module_is_cast_to(linear: nn.Linear) -> None:
    layer = Float8Linear(linear, 3.0)
    before = layer.values.view(torch.uint8).clone()
    scales = layer.weight_scale.clone()
    layer.to(torch.bfloat16).float()
    assert layer.values.dtype == layer.zero.dtype == E4M3
    assert torch.equal(layer.values.view(torch.uint8), before)
    assert torch.equal(layer.weight_scale, scales)
