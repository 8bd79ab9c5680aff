"""Engines that are no more than a segment's torch module."""

from __future__ import annotations

import torch
from torch import Tensor

from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import engine_outputs


class EagerEngine:
    """A segment's torch module behind the protocol of engines."""

    alignment = 1

    def __init__(self, module: SegmentModule) -> None:
        self.module = module

    def context(self) -> EagerContext:
        return EagerContext(self.module)


class EagerContext:
    """Runs the module on bound tensors; outputs have exactly their shape and dtype, and are no input too."""

    def __init__(self, module: SegmentModule) -> None:
        self.module = module
        self.bound: dict[str, Tensor] = {}

    def bind(self, name: str, tensor: Tensor) -> None:
        self.bound[name] = tensor

    def enqueue(self, stream: int) -> None:
        names = engine_outputs(self.module.inputs, self.module.outputs)
        for name in names:
            self.bound[name].fill_(torch.nan)
        outputs = self.module(*(self.bound[name] for name in self.module.inputs))
        for name, output in zip(names, outputs, strict=True):
            assert output.shape == self.bound[name].shape and output.dtype == self.bound[name].dtype
            self.bound[name].copy_(output)
