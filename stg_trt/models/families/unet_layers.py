"""The layers of a spatio-temporal UNet in running order, read from its configuration alone.

A perturbable block is one half of an attention module: block 2i is its spatial transformer, 2i+1 its temporal
one. A block comes with the layers that follow it up to the next block, so that a cut before a block shares as
much as it can; the layers before the first block belong to the front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

Kind = Literal["resnet", "spatial", "temporal", "downsample", "upsample"]
# The submodules of an attention module that its spatial half owns.
_SPATIAL = ("norm", "proj_in", "transformer_blocks")


@dataclass(frozen=True)
class Layer:
    """One layer, at `path` in diffusers' UNet; every level halves the size of the one before.

    It `takes` a skip tensor, which is joined to its input, or `gives` its output as one; both by number.
    """

    kind: Kind
    path: str
    level: int
    inputs: int
    channels: int
    takes: int | None = None
    gives: int | None = None

    @property
    def is_block(self) -> bool:
        """Whether its self-attention can be perturbed."""
        return self.kind in ("spatial", "temporal")

    @property
    def output_level(self) -> int:
        """The level of its result."""
        return self.level + (self.kind == "downsample") - (self.kind == "upsample")

    def owns(self, weight: str) -> bool:
        """Whether a weight of the UNet is this layer's; the halves of an attention module share its path."""
        if not weight.startswith(f"{self.path}."):
            return False
        spatial = weight.removeprefix(f"{self.path}.").split(".")[0] in _SPATIAL
        return not self.is_block or spatial == (self.kind == "spatial")


@dataclass(frozen=True)
class Skip:
    """A tensor that the decoder takes from the encoder, made before the layer at `place`."""

    channels: int
    level: int
    place: int


@dataclass(frozen=True)
class UNetLayers:
    """All layers but the first and last convolution; skip tensor 0 is the first convolution's."""

    layers: tuple[Layer, ...]
    skips: tuple[Skip, ...]

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """The place of every block among the layers."""
        return tuple(place for place, layer in enumerate(self.layers) if layer.is_block)

    @property
    def first_decoder_block(self) -> int:
        """The spatial half of the decoder's first attention module."""
        paths = [self.layers[place].path for place in self.blocks]
        return next(block for block, path in enumerate(paths) if path.startswith("up_blocks"))

    def place(self, block: int) -> int:
        """Where a block starts; behind the last one is the end."""
        return self.blocks[block] if block < len(self.blocks) else len(self.layers)

    def owner(self, weight: str) -> int | None:
        """The block that a weight comes with; None for the layers before the first and for the head."""
        places = (place for place, layer in enumerate(self.layers) if layer.owns(weight))
        place = next(places, -1)
        owners = [block for block, start in enumerate(self.blocks) if start <= place]
        return owners[-1] if owners else None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> UNetLayers:
        """Those of UNetSpatioTemporalConditionModel."""
        return _Walk(tuple(config["block_out_channels"]), config["layers_per_block"]).over(
            [_has_attention(name) for name in config["down_block_types"]],
            [_has_attention(name) for name in config["up_block_types"]],
        )


def _has_attention(block_type: str) -> bool:
    return block_type.startswith("CrossAttn")


@dataclass
class _Walk:
    """Collects layers on the way down, through the middle, and up again."""

    widths: Sequence[int]
    depth: int
    layers: list[Layer] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)

    def over(self, down: Sequence[bool], up: Sequence[bool]) -> UNetLayers:
        """The layers, of blocks of which some attend."""
        self.skips.append(Skip(self.widths[0], 0, 0))
        for level, attends in enumerate(down):
            self._down(level, attends)
        lowest = len(self.widths) - 1
        self._resnet("mid_block.resnets.0", lowest)
        self._attention("mid_block.attentions.0", lowest)
        self._resnet("mid_block.resnets.1", lowest)
        unread = list(range(len(self.skips)))
        for number, attends in enumerate(up):
            self._up(number, attends, unread)
        return UNetLayers(tuple(self.layers), tuple(self.skips))

    def _down(self, level: int, attends: bool) -> None:
        path = f"down_blocks.{level}"
        for number in range(self.depth):
            self._resnet(f"{path}.resnets.{number}", level)
            if attends:
                self._attention(f"{path}.attentions.{number}", level)
            self._give(level)
        if level + 1 < len(self.widths):
            self._resize("downsample", f"{path}.downsamplers.0", level)
            self._give(level + 1)

    def _up(self, number: int, attends: bool, unread: list[int]) -> None:
        path, level = f"up_blocks.{number}", len(self.widths) - 1 - number
        for place in range(self.depth + 1):
            self._resnet(f"{path}.resnets.{place}", level, unread.pop())
            if attends:
                self._attention(f"{path}.attentions.{place}", level)
        if level:
            self._resize("upsample", f"{path}.upsamplers.0", level)

    def _resnet(self, path: str, level: int, takes: int | None = None) -> None:
        inputs = self.layers[-1].channels if self.layers else self.widths[0]
        joined = 0 if takes is None else self.skips[takes].channels
        self.layers.append(Layer("resnet", path, level, inputs + joined, self.widths[level], takes))

    def _attention(self, path: str, level: int) -> None:
        width = self.widths[level]
        self.layers.append(Layer("spatial", path, level, width, width))
        self.layers.append(Layer("temporal", path, level, width, width))

    def _resize(self, kind: Kind, path: str, level: int) -> None:
        self.layers.append(Layer(kind, path, level, self.widths[level], self.widths[level]))

    def _give(self, level: int) -> None:
        """What was computed last, at a level, is a skip tensor."""
        self.layers[-1] = replace(self.layers[-1], gives=len(self.skips))
        self.skips.append(Skip(self.layers[-1].channels, level, len(self.layers)))


def hidden_of(level: int) -> str:
    """Hidden states between layers of a level."""
    return f"hidden_{level}"


def tokens_of(level: int) -> str:
    """Hidden states between the halves of an attention module."""
    return f"tokens_{level}"


def residual_of(level: int) -> str:
    """What an attention module adds its result to."""
    return f"residual_{level}"


def skip_of(number: int) -> str:
    """A tensor that the decoder takes from the encoder."""
    return f"skip_{number}"
