"""Floating-point operations of LTX-2's segments, for one row."""

from __future__ import annotations

from dataclasses import dataclass

from stg_trt.models.segment import Segment


@dataclass(frozen=True)
class StreamCosts:
    """Sizes of one stream; `places` are the timesteps that its tokens can have."""

    tokens: int
    width: int
    heads: int
    in_channels: int
    out_channels: int
    places: int


@dataclass(frozen=True)
class Costs:
    """Sizes of video and sound, of the text, and of what they have in common."""

    streams: tuple[StreamCosts, StreamCosts]
    text_length: int
    caption_channels: int
    cross_width: int
    timestep_channels: int
    gated: bool
    modulates_text: bool


def segment_flops(costs: Costs, segment: Segment) -> int:
    """2 for a multiply-add, 4*N*S*C for an attention."""
    if segment.text:
        per_token = (2 * stream.width * (costs.caption_channels + stream.width) for stream in costs.streams)
        return costs.text_length * sum(per_token)
    skipped = segment.skipped.blocks if segment.skipped else ()
    leaves_out = segment.skipped is not None and segment.skipped.mode == "stg-r"
    total = 0
    for block in segment.blocks:
        if block in skipped and leaves_out:
            continue
        total += _exchange(costs)
        total += sum(_own_layers(costs, stream, block in skipped) for stream in costs.streams)
    for stream in costs.streams:
        if segment.front:
            total += 2 * stream.tokens * stream.width * stream.in_channels + _timesteps(costs, stream)
        if segment.back:
            total += 2 * stream.tokens * stream.width * stream.out_channels
    return total


def _own_layers(costs: Costs, stream: StreamCosts, skipped: bool) -> int:
    """A block's self-attention, attention to the text and feed-forward."""
    tokens, width, text = stream.tokens, stream.width, costs.text_length
    to_self = 4 * tokens * width**2 if skipped else 8 * tokens * width**2 + 4 * tokens**2 * width
    to_text = 4 * tokens * width**2 + 4 * text * width**2 + 4 * tokens * text * width
    gates = 4 * tokens * width * stream.heads if costs.gated else 0
    return to_self + to_text + gates + 16 * tokens * width**2


def _exchange(costs: Costs) -> int:
    """A block's attention of either stream to the other."""
    video, sound = costs.streams
    total = 8 * video.tokens * sound.tokens * costs.cross_width
    for stream in costs.streams:
        # Query and output where it reads, key and value where it is read.
        total += 8 * stream.tokens * stream.width * costs.cross_width
        total += 2 * stream.tokens * stream.width * sound.heads if costs.gated else 0
    return total


def _timesteps(costs: Costs, stream: StreamCosts) -> int:
    """The networks that make the modulation of timesteps."""
    of_places = [9 if costs.modulates_text else 6, 4]
    of_step = [1, *([2] if costs.modulates_text else [])]

    def network(parameters: int) -> int:
        return 2 * stream.width * (costs.timestep_channels + stream.width + parameters * stream.width)

    return stream.places * sum(map(network, of_places)) + sum(map(network, of_step))
