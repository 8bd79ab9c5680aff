"""What optimisations of the engines should gain by the bytes and tiles they save, and what two of them do.

Each number is a ratio of times, before over after, of the part of a block that the optimisation changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stg_trt.runtime.device import Device
from stg_trt.system.gpu import find_gpu

from .clock import Work, alternate, median_ratio
from .roofline import measure_peak_matmul

_TABLE_BYTES = 4
# The rows and columns of a large product that one multiprocessor of Hopper computes at a time.
_TILE = 128, 256
_ROPE = "norm and rotation of q and k"


@dataclass(frozen=True)
class Sizes:
    """A block of a DiT: `rows` of `tokens`, whose `width` the feed-forward widens."""

    rows: int
    tokens: int
    width: int
    feed_forward_width: int
    dtype: torch.dtype

    @property
    def element_bytes(self) -> int:
        """Of one value."""
        return self.dtype.itemsize

    @property
    def hidden_bytes(self) -> int:
        """The hidden states of all rows."""
        return self.rows * self.tokens * self.width * self.element_bytes


# LTX-Video 2B at 704x480x121 with STG; on a CPU, what it multiplies in a moment.
SIZES = {
    "cuda": Sizes(3, 5280, 2048, 8192, torch.bfloat16),
    "cpu": Sizes(3, 256, 512, 2048, torch.float32),
}


@dataclass(frozen=True)
class Rates:
    """What a device reaches; `multiprocessors` is None if it has none."""

    flops_per_s: float
    bytes_per_s: float
    multiprocessors: int | None


@dataclass(frozen=True)
class Gain:
    """An optimisation of a backend's engines; `expected` is None if sizes do not tell.

    `works` are the part before and after, where both can be run apart from an engine.
    """

    name: str
    backend: str
    part: str
    derivation: str
    expected: Callable[[Sizes, Rates], float | None]
    works: Callable[[Sizes, Device], tuple[Work, Work]] | None = None
    only_on: str | None = None

    def to_json(self, sizes: Sizes, rates: Rates, device: Device, rounds: int) -> dict[str, Any]:
        """For a result: the expected and, if it can be measured here, the measured ratio."""
        expected = self.expected(sizes, rates)
        facts = {"name": self.name, "backend": self.backend, "part": self.part, "derivation": self.derivation}
        return {
            **facts,
            "expected": None if expected is None else round(expected, 3),
            "measured": self._measured(sizes, device, rounds),
        }

    def _measured(self, sizes: Sizes, device: Device, rounds: int) -> float | None:
        if self.works is None or self.only_on not in (None, device.torch_device.type):
            return None
        before, after = self.works(sizes, device)
        times = alternate({"before": before, "after": after}, rounds, device)
        return round(median_ratio(times["before"], times["after"]), 3)


def measure_gains(device: Device, bytes_per_s: float, rounds: int) -> list[dict[str, Any]]:
    """All of GAINS for a result, at the sizes for the device, which copies so many bytes a second."""
    sizes, gpu = SIZES[device.torch_device.type], find_gpu()
    peak = measure_peak_matmul(device, str(sizes.dtype).removeprefix("torch."))
    multiprocessors = gpu.multiprocessors if gpu and device.torch_device.type == "cuda" else None
    rates = Rates(peak.flops_per_s, bytes_per_s, multiprocessors)
    return [gain.to_json(sizes, rates, device, rounds) for gain in GAINS]


def _rope_bytes(sizes: Sizes, *, tables: int, entries: float) -> float:
    """q and k read and written, and so many pairs of tables with so many entries per channel read."""
    return 4 * sizes.hidden_bytes + 2 * tables * sizes.tokens * sizes.width * entries * _TABLE_BYTES


def _half_tables(sizes: Sizes, rates: Rates) -> float:
    return _rope_bytes(sizes, tables=1, entries=1) / _rope_bytes(sizes, tables=1, entries=1 / 2)


def _one_table(sizes: Sizes, rates: Rates) -> float:
    return _rope_bytes(sizes, tables=sizes.rows, entries=1 / 2) / _rope_bytes(sizes, tables=1, entries=1 / 2)


def _one_product(sizes: Sizes, rates: Rates) -> float:
    """The rounds in which all multiprocessors compute a tile each; the last one may be nearly empty."""
    if rates.multiprocessors is None:
        return 1.0
    rows, columns = _TILE
    tiles = ceil(sizes.rows * sizes.tokens / rows) * ceil(sizes.width / columns)
    return 3 * ceil(tiles / rates.multiprocessors) / ceil(3 * tiles / rates.multiprocessors)


def _gelu_epilogue(sizes: Sizes, rates: Rates) -> float:
    values = sizes.rows * sizes.tokens * sizes.feed_forward_width
    product_s = 2 * values * sizes.width / rates.flops_per_s
    return 1 + 2 * values * sizes.element_bytes / rates.bytes_per_s / product_s


def _unchanged(sizes: Sizes, rates: Rates) -> float:
    return 1.0


def _unknown(sizes: Sizes, rates: Rates) -> None:
    return None


def _products(sizes: Sizes, device: Device) -> tuple[Work, Work]:
    """Queries, keys and values as three products, and as one with three views."""
    x, weight, bias = _linear(sizes, 3 * sizes.width, device)
    apart = [*zip(weight.chunk(3), bias.chunk(3), strict=True)]

    def before() -> None:
        for linear in apart:
            functional.linear(x, *linear)

    return Work(before), Work(lambda: (functional.linear(x, weight, bias).chunk(3, -1), None)[1])


def _gelu(sizes: Sizes, device: Device) -> tuple[Work, Work]:
    """A product with GELU as a pass of its own, and as its epilogue."""
    x, weight, bias = _linear(sizes, sizes.feed_forward_width, device)

    def before() -> None:
        functional.gelu(functional.linear(x, weight, bias), approximate="tanh")

    def after() -> None:
        torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=True)

    return Work(before), Work(after)


def _linear(sizes: Sizes, outputs: int, device: Device) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens of all rows, weight and bias."""
    shapes = (sizes.rows * sizes.tokens, sizes.width), (outputs, sizes.width), (outputs,)
    x, weight, bias = (torch.randn(shape, device=device.torch_device).to(sizes.dtype) for shape in shapes)
    return x, weight / sizes.width**0.5, bias


GAINS = (
    Gain(
        "half RoPE tables",
        "all",
        _ROPE,
        "bytes: q and k in and out, and the tables, which have an entry per pair of channels",
        _half_tables,
    ),
    Gain(
        "one RoPE table for all rows",
        "all",
        _ROPE,
        "bytes: q and k in and out, and the tables, which are read once instead of once per row",
        _one_table,
    ),
    Gain(
        "q, k and v in one product",
        "inductor",
        "products of q, k and v",
        f"rounds of {_TILE[0]}x{_TILE[1]} tiles over all multiprocessors; TensorRT does the same by itself",
        _one_product,
        _products,
    ),
    Gain(
        "GELU in the product's epilogue",
        "inductor",
        "first product of the feed-forward",
        "the product by its operations, and the bytes of reading and writing its result once more",
        _gelu_epilogue,
        _gelu,
        only_on="cuda",
    ),
    Gain("static profiles", "tensorrt", "step", "same bytes; kernels are picked for these rows", _unknown),
    Gain("timing cache", "tensorrt", "step", "same kernels; a second build times none of them", _unchanged),
    Gain("optimisation level", "tensorrt", "step", "same bytes; more kernels are tried", _unknown),
)
