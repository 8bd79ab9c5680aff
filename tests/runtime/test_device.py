"""A device's stream and the caller's: what one enqueues, the other may read."""

from __future__ import annotations

import pytest
import torch

from stg_trt.runtime.device import Cuda


@pytest.mark.gpu
def test_the_streams_wait_for_each_other() -> None:
    device = Cuda()
    x, total = torch.zeros(1 << 24, device="cuda"), 0.0
    for i in range(50):
        x.fill_(i)
        with device.scope():
            for _ in range(20):
                x.add_(1)
        total += float(x.double().mean()) - (i + 20)
    assert total == 0


@pytest.mark.gpu
def test_a_scope_inside_a_scope() -> None:
    device = Cuda()
    with device.scope(), device.scope():
        assert torch.cuda.current_stream().cuda_stream == device.stream
    assert torch.cuda.current_stream().cuda_stream != device.stream
