"""How each family's diffusers transformer is called, and its self-attention skipped, by public pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.families.base import ModelFamily, TextCondition, Workload


@dataclass(frozen=True)
class UncutModel:
    """One family's transformer in diffusers.

    `arguments` are what its pipeline passes beside latents and timestep, for the rows of a text and a frame
    rate. `attention` is the name of the blocks' self-attention; `skipping` makes of its processor one that
    skips it in the last row (stg-a).
    """

    arguments: Callable[[Any, TextCondition, Workload, float], dict[str, Any]]
    attention: str
    skipping: Callable[[Any], Any]


def uncut_model(family: ModelFamily) -> UncutModel:
    """The family's entry; raises InvalidRequest where there is none."""
    if family.name not in _UNCUT:
        raise InvalidRequest(
            f"checkpoint: expected a model of {', '.join(_UNCUT)}, got {family.name}, which the benchmarks "
            "cannot compare with diffusers: use stg-trt bench build"
        )
    return _UNCUT[family.name]


class ValuesOnlyInSkipRow:
    """stg-a as an attention processor: the stock one for the other rows, to_out(V) for the last."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(self, attn: Any, hidden_states: Tensor, *others: Any, **options: Any) -> Tensor:
        rows = len(hidden_states)
        others, options = _without_last_row((others, options), rows)
        attended = self.stock(attn, hidden_states[:-1], *others, **options)
        values = attn.to_out[0](attn.to_v(hidden_states[-1:]))
        return torch.cat([attended, values])


class TextFirstInSkipRow:
    """stg-a of a joint attention whose text comes first: the stock processor, in the last row under a mask.

    Video tokens see themselves and the text there, no other video token; text sees everything.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert attention_mask is None
        text, tokens = encoder_hidden_states.shape[1], hidden_states.shape[1]
        seen = torch.ones(1, text + tokens, text + tokens, dtype=torch.bool, device=hidden_states.device)
        seen[:, text:, text:] = torch.eye(tokens, dtype=torch.bool, device=hidden_states.device)
        rows = [
            self.stock(attn, hidden_states[chosen], encoder_hidden_states[chosen], mask, image_rotary_emb)
            for chosen, mask in ((slice(None, -1), None), (slice(-1, None), seen))
        ]
        video, text_out = (torch.cat(streams) for streams in zip(*rows, strict=True))
        return video, text_out


def _without_last_row(given: Any, rows: int) -> Any:
    """Arguments without the last row of the tensors that have one; a table for all rows stays."""
    if isinstance(given, Tensor):
        return given[:-1] if len(given) == rows else given
    if isinstance(given, dict):
        return {name: _without_last_row(value, rows) for name, value in given.items()}
    return tuple(_without_last_row(value, rows) for value in given) if isinstance(given, tuple) else given


def _ltx_video_arguments(
    family: Any, text: TextCondition, workload: Workload, frame_rate: float
) -> dict[str, Any]:
    _, frames, height, width = family.latent_shape(workload)
    temporal, spatial = family.compression
    return {
        "encoder_hidden_states": text.embeds,
        "encoder_attention_mask": text.mask,
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (temporal / frame_rate, spatial, spatial),
    }


def _wan_arguments(family: Any, text: TextCondition, workload: Workload, frame_rate: float) -> dict[str, Any]:
    # Its pipeline pads with zeros and passes no mask.
    return {"encoder_hidden_states": text.embeds * text.mask[:, :, None].to(text.embeds)}


def _cogvideox_arguments(
    family: Any, text: TextCondition, workload: Workload, frame_rate: float
) -> dict[str, Any]:
    tables = family.constants(text, workload, frame_rate)
    rope = tuple(tables[name].to(text.embeds.device) for name in ("rope_cos", "rope_sin") if name in tables)
    return {"encoder_hidden_states": text.embeds, "image_rotary_emb": rope or None}


_UNCUT = {
    "cogvideox": UncutModel(_cogvideox_arguments, "attn1", TextFirstInSkipRow),
    "ltx-video": UncutModel(_ltx_video_arguments, "attn1", ValuesOnlyInSkipRow),
    "wan2.1": UncutModel(_wan_arguments, "attn1", ValuesOnlyInSkipRow),
}
