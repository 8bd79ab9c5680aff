"""A run of the layers of a spatio-temporal UNet as one exportable module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stg_trt.models.families.base import CONDITION, IMAGE_EMBEDS
from stg_trt.models.families.keep_flags import KEEP_ATTENTION, KEEP_LAYER
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.families.unet_layers import Kind, Layer, hidden_of, residual_of, skip_of, tokens_of
from stg_trt.models.families.unet_modules import (
    Perturbed,
    Resample,
    Resnet,
    SpatialHalf,
    TemporalHalf,
    activated,
    over_frames,
)
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import index_of

State = dict[str, Tensor]
# The frames per second, less one as the model was trained; the motion bucket and the strength of the noise.
FPS, MOTION = "fps", "motion"
_MODULES: Mapping[Kind, type[nn.Module]] = {
    "resnet": Resnet,
    "spatial": SpatialHalf,
    "temporal": TemporalHalf,
    "downsample": Resample,
    "upsample": Resample,
}


class UNetSegment(SegmentModule):
    """The layers of a segment, which read and write hidden states of their level."""

    def __init__(self, unet: Any, segment: Segment, layers: Sequence[Layer], *borders: Any) -> None:
        super().__init__(*borders)
        blocks, skipped = iter(segment.blocks), segment.skipped
        # By layer: how its self-attention is perturbed in all rows.
        self.modes = tuple(
            skipped.mode if layer.is_block and skipped and next(blocks) in skipped.blocks else None
            for layer in layers
        )
        # Without their place in the model: equal segments are exported once.
        self.plan = tuple(replace(layer, path="") for layer in layers)
        self.layers = nn.ModuleList(_MODULES[layer.kind](unet.get_submodule(layer.path)) for layer in layers)
        self.front, self.back = segment.front, segment.back
        if segment.front:
            self.conv_in = unet.conv_in
            self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
            self.add_time_proj, self.add_embedding = unet.add_time_proj, unet.add_embedding
        if segment.back:
            self.conv_norm_out, self.conv_out = unet.conv_norm_out, unet.conv_out

    def run(self, tensors: State) -> State:
        state = dict(tensors)
        for name, tensor in tensors.items():
            if index_of(name) in tensors:
                state[name] = tensor.index_select(0, tensors[index_of(name)])
        if self.front:
            state |= self._embed(state)
        for place in range(len(self.plan)):
            state |= self._layer(place, state)
        if self.back:
            state["pred"] = _every_frame(self._head, state[hidden_of(0)])
        return state

    def _embed(self, state: State) -> State:
        """The first convolution, over latents beside the picture's, and the embedded scalars."""
        joined = torch.cat([state["latents"], state[CONDITION]], 2)
        motion = state[MOTION]
        scalars = torch.cat([state[FPS].expand(motion.shape[0], -1), motion], 1)
        embedded = self.add_time_proj(scalars.flatten()).unflatten(0, (-1, scalars.shape[1])).flatten(1)
        temb = self.time_embedding(self.time_proj(state["timestep"])) + self.add_embedding(embedded)
        hidden = _every_frame(self.conv_in, joined)
        return {hidden_of(0): hidden, skip_of(0): hidden, "temb": temb}

    def _head(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.conv_out(activated(self.conv_norm_out, hidden))
        return out

    def _layer(self, place: int, state: State) -> State:
        """What a layer writes: hidden states, and a skip tensor if it gives one."""
        layer, module = self.plan[place], self.layers[place]
        hidden = state.get(hidden_of(layer.level))
        if layer.kind == "spatial":
            tokens = module(hidden, state[IMAGE_EMBEDS], self._perturbed(place, state))
            return {tokens_of(layer.level): tokens, residual_of(layer.level): hidden}
        if layer.kind == "temporal":
            halves = state[tokens_of(layer.level)], state[residual_of(layer.level)]
            out = module(*halves, state[IMAGE_EMBEDS], self._perturbed(place, state))
        elif layer.kind == "resnet":
            out = module(self._joined(layer, state), state["temb"])
        elif layer.kind == "downsample":
            out = module(hidden)
        else:
            out = module(hidden, self._size_of_next(place, state))
        name = hidden_of(layer.output_level)
        return {name: out} if layer.gives is None else {name: out, skip_of(layer.gives): out}

    def _joined(self, layer: Layer, state: State) -> Tensor:
        """Hidden states with the channels of what the layer takes."""
        hidden = state[hidden_of(layer.level)]
        return hidden if layer.takes is None else torch.cat([hidden, state[skip_of(layer.takes)]], 2)

    def _perturbed(self, place: int, state: State) -> Perturbed:
        """In all rows, or by flags of rows, which a segment of one block has."""
        return Perturbed(self.modes[place], state.get(KEEP_ATTENTION), state.get(KEEP_LAYER))

    def _size_of_next(self, place: int, state: State) -> tuple[int, int]:
        """Height and width of the skip tensor that the next layer takes."""
        taken = self.plan[place + 1].takes
        assert taken is not None
        height, width = state[skip_of(taken)].shape[-2:]
        return height, width


def _every_frame(function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """The function of every frame of (rows, frames, ...)."""
    return over_frames(function(hidden.flatten(0, 1)), hidden.shape[1])
