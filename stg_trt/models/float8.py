"""Which linear layers an FP8 build keeps in the precision around them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Float8Rule:
    """A family's layers that are not FP8; embeddings, head and text projections, in no block, never are.

    `kept_layers` is a regular expression over a layer's name inside its block: modulations, which read the
    timestep, and gates of a few channels. The first and the last `kept_ends` blocks stay whole, as in
    NVIDIA's recipes for video models; of models with fewer than 25 blocks, a tenth of them at each end.
    """

    kept_layers: str = r"norm"
    kept_ends: int = 3

    def end_blocks(self, num_blocks: int) -> frozenset[int]:
        """The blocks at both ends that stay whole."""
        ends = min(self.kept_ends, round(num_blocks / 10))
        return frozenset((*range(ends), *range(num_blocks - ends, num_blocks)))

    def takes(self, layer: str, kept_blocks: Iterable[int]) -> bool:
        """Whether a linear layer of a segment's module, by its name, becomes FP8."""
        found = _LAYER.fullmatch(layer)
        if found is None or int(found[1]) in kept_blocks:
            return False
        return re.search(self.kept_layers, found[2]) is None


def neighbours(blocks: Iterable[int], num_blocks: int) -> frozenset[int]:
    """Some blocks, and those before and after each."""
    around = {near for block in blocks for near in (block - 1, block, block + 1)}
    return frozenset(around & {*range(num_blocks)})


def block_of_layer(layer: str) -> int:
    """The block of a layer that a rule takes."""
    found = _LAYER.fullmatch(layer)
    assert found is not None
    return int(found[1])
