"""The shared part of spatio-temporal UNets: where they are cut, what crosses a cut, and what it costs.

Hidden states cross a cut, between the halves of an attention module beside what its result is added to, and
the embedded timestep. What the decoder takes from the encoder keeps the rows of the passes that made it, and
a segment reads it by an index: up to its first perturbed block a skip pass is cond.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import nn

from stg_trt.models.families.base import CONDITION, IMAGE_EMBEDS, ModelFamily
from stg_trt.models.families.keep_flags import (
    KEEP_ATTENTION,
    KEEP_LAYER,
    keep_attention_spec,
    keep_layer_spec,
)
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.families.unet_layers import (
    Layer,
    UNetLayers,
    hidden_of,
    residual_of,
    skip_of,
    tokens_of,
)
from stg_trt.models.families.unet_segment import FPS, MOTION, UNetSegment
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import ROWS, Dim, TensorSpec, index_of, index_spec
from stg_trt.models.workload import Workload

# Time and position embeddings, norms and mixtures, which are applied in float32.
_FLOAT32_ISLANDS = r"norm|mix_factor|time_pos_embed|time_embedding|add_embedding"
_SCALARS = 3
Size = tuple[int, int]


class SpatioTemporalUNet(ModelFamily):
    """diffusers' UNetSpatioTemporalConditionModel; block 2i and 2i+1 are the halves of attention module i."""

    transformer_class = "UNetSpatioTemporalConditionModel"
    config_file: ClassVar[str] = "unet/config.json"
    transformers = ("unet",)
    block_counts = ("layers_per_block",)
    splits_runs = False

    @cached_property
    def unet(self) -> UNetLayers:
        """The layers of the model."""
        return UNetLayers.of(self.config)

    @property
    def num_blocks(self) -> int:
        return len(self.unet.blocks)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the levels."""
        return tuple(self.config["block_out_channels"])

    @property
    def temb_width(self) -> int:
        """Channels of the embedded timestep."""
        return 4 * self.widths[0]

    @property
    def context_width(self) -> int:
        """Channels of the picture's token."""
        return self.integer("cross_attention_dim")

    def segments(self, layout: str, mode: str, blocks: tuple[int, ...]) -> tuple[Segment, ...]:
        return tuple(
            replace(
                segment,
                stg_r_inside=segment.skipped is not None or _is_perturbable(segment, blocks),
                indexed_before=None if segment.front else segment.start,
            )
            for segment in super().segments(layout, mode, blocks)
        )

    def block_of(self, weight_name: str) -> int | None:
        return self.unet.owner(weight_name)

    def tokens(self, workload: Workload) -> int:
        return workload.num_frames * math.prod(self._size(workload, 0))

    def noise_shape(self, workload: Workload) -> tuple[int, ...]:
        channels, frames, height, width = self.latent_shape(workload)
        return frames, channels, height, width

    def tensors(self, workload: Workload) -> dict[str, TensorSpec]:
        latents: tuple[Dim, ...] = (ROWS, *self.noise_shape(workload))
        dtype = workload.dtype
        specs = (
            TensorSpec("latents", dtype, latents),
            TensorSpec("timestep", "float32", (ROWS,)),
            TensorSpec(CONDITION, dtype, latents),
            TensorSpec(FPS, "float32", (1,)),
            TensorSpec(MOTION, "float32", (ROWS, _SCALARS - 1)),
            TensorSpec(IMAGE_EMBEDS, dtype, (ROWS, 1, self.context_width)),
            TensorSpec("temb", "float32", (ROWS, self.temb_width)),
            TensorSpec("pred", dtype, latents),
            keep_attention_spec(),
            keep_layer_spec(),
            *self._crossing_tensors(workload),
        )
        return {spec.name: spec for spec in specs}

    def _crossing_tensors(self, workload: Workload) -> Iterator[TensorSpec]:
        """Hidden states of every level, and what the decoder takes from the encoder."""
        frames, dtype = workload.num_frames, workload.dtype
        for level, width in enumerate(self.widths):
            size = self._size(workload, level)
            for name in (hidden_of(level), residual_of(level)):
                yield TensorSpec(name, dtype, (ROWS, frames, width, *size))
            yield TensorSpec(tokens_of(level), dtype, (ROWS, frames, *size, width))
        for number, skip in enumerate(self.unet.skips):
            shape = (ROWS, frames, skip.channels, *self._size(workload, skip.level))
            yield TensorSpec(skip_of(number), dtype, shape)
            yield index_spec(skip_of(number))

    def borders(self, segment: Segment) -> tuple[tuple[str, ...], tuple[str, ...]]:
        places = self._places(segment)
        kinds = {layer.kind for layer in self._layers(segment)}
        if segment.front:
            inputs = ["latents", "timestep", CONDITION, FPS, MOTION]
        else:
            inputs = [*self._crossing(places.start), *(["temb"] if "resnet" in kinds else [])]
            inputs += self._taken(segment)
        inputs += [IMAGE_EMBEDS] if kinds & {"spatial", "temporal"} else []
        inputs += [KEEP_ATTENTION] if segment.keep_input else []
        inputs += [KEEP_LAYER] if segment.stg_r_inside and segment.skipped is None else []
        if segment.back:
            return tuple(inputs), ("pred",)
        made = ["temb"] if segment.front else []
        return tuple(inputs), (*self._crossing(places.stop), *made, *self._given(segment))

    def module(self, transformer: nn.Module, segment: Segment, *, expand_masks: bool) -> SegmentModule:
        return UNetSegment(transformer, segment, self._layers(segment), *self.borders(segment), expand_masks)

    def lower_precision(self, module: SegmentModule, dtype: torch.dtype) -> None:
        for name, parameter in module.named_parameters():
            if not re.search(_FLOAT32_ISLANDS, name):
                parameter.data = parameter.data.to(dtype)

    def attentions(self, segment: Segment) -> int:
        # That to the picture's one token is no attention: its softmax is 1.
        skipped = segment.skipped.blocks if segment.skipped else ()
        return sum(block not in skipped for block in segment.blocks)

    def activation_limit(self, segment: Segment, workload: Workload, rows: int) -> int:
        # Widest point: both halves of the feed-forward beside the hidden states, each allowed a float32 copy.
        values = (math.prod(self._size(workload, level)) * width for level, width in enumerate(self.widths))
        return rows * workload.num_frames * max(values) * 16 * 4 + (8 << 20)

    def segment_flops(self, segment: Segment, workload: Workload) -> int:
        skipped = segment.skipped
        total, block = 0, segment.start
        for layer in self._layers(segment):
            mode = skipped.mode if skipped and layer.is_block and block in skipped.blocks else None
            total += self._layer_flops(layer, workload, mode)
            block += layer.is_block
        convolution = 2 * 9 * self.tokens(workload) * self.widths[0]
        if segment.front:
            width, embedded = self.temb_width, _SCALARS * self.integer("addition_time_embed_dim")
            total += convolution * self.integer("in_channels")
            total += 2 * width * (self.widths[0] + embedded + 2 * width)
        return total + (convolution * self.integer("out_channels") if segment.back else 0)

    def _layer_flops(self, layer: Layer, workload: Workload, mode: str | None) -> int:
        """Operations of a layer for one row; `mode` is its perturbation."""
        frames, size = workload.num_frames, math.prod(self._size(workload, layer.output_level))
        if layer.is_block:
            return self._block_flops(layer, frames, size, mode)
        tokens, width = frames * size, layer.channels
        convolution = 2 * 9 * tokens * width * layer.inputs
        if layer.kind != "resnet":
            return convolution
        shortcut = 2 * tokens * width * layer.inputs if layer.inputs != width else 0
        # The second convolution of a frame, two over three frames, and the timestep in both halves.
        others = 2 * (9 + 2 * 3) * tokens * width**2 + 2 * 2 * self.temb_width * width
        return convolution + shortcut + others

    def _block_flops(self, layer: Layer, frames: int, size: int, mode: str | None) -> int:
        tokens, width = frames * size, layer.channels
        attended = size if layer.kind == "spatial" else frames
        kept = {None: 2 * 4 * width**2 + 4 * attended * width, "stg-a": 2 * 2 * width**2, "stg-r": 0}
        feed_forward, projection = 2 * 12 * width**2, 2 * width**2
        total = tokens * (kept[mode] + feed_forward + projection) + 2 * width * (self.context_width + width)
        if layer.kind == "spatial":
            return total
        # A feed-forward before the attention, and the frames' positions.
        return total + tokens * feed_forward + frames * 2 * 8 * width**2

    def _size(self, workload: Workload, level: int) -> Size:
        """Height and width at a level, each rounded up."""
        _, _, height, width = self.latent_shape(workload)
        return -(-height // 2**level), -(-width // 2**level)

    def _places(self, segment: Segment) -> range:
        """Of its layers among all."""
        start = 0 if segment.front else self.unet.place(segment.start)
        return range(start, self.unet.place(segment.stop))

    def _layers(self, segment: Segment) -> tuple[Layer, ...]:
        places = self._places(segment)
        return self.unet.layers[places.start : places.stop]

    def _crossing(self, place: int) -> tuple[str, ...]:
        """Hidden states before the layer at a place."""
        before = self.unet.layers[place - 1]
        if before.kind == "spatial":
            return tokens_of(before.level), residual_of(before.level)
        return (hidden_of(before.output_level),)

    def _taken(self, segment: Segment) -> list[str]:
        """What its layers take that others gave, with indices of what keeps its own rows."""
        start, names = self._places(segment).start, []
        for number in (layer.takes for layer in self._layers(segment)):
            if number is None or self.unet.skips[number].place > start:
                continue
            names.append(skip_of(number))
            before = segment.indexed_before
            if before is not None and self.unet.skips[number].place <= self.unet.place(before):
                names.append(index_of(skip_of(number)))
        return names

    def _given(self, segment: Segment) -> list[str]:
        """What its layers give that others take."""
        given = [0] if segment.front else []
        given += [layer.gives for layer in self._layers(segment) if layer.gives is not None]
        taken = {layer.takes for layer in self._layers(segment)}
        return [skip_of(number) for number in given if number not in taken]


def _is_perturbable(segment: Segment, blocks: tuple[int, ...]) -> bool:
    """Whether it is one of the blocks that a cut was made around."""
    return not (segment.front or segment.back) and segment.start in blocks
