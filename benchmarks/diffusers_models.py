"""How each family's whole transformer is called, and its self-attention skipped, by public pipelines.

It is diffusers', but for Open-Sora, which diffusers does not have: there it is our own module, uncut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from stg_trt.errors import InvalidRequest
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload


@dataclass(frozen=True)
class DiffusersModel:
    """One family's transformer, in diffusers unless `source` says otherwise.

    `arguments` are those that its pipeline passes besides latents and timestep, for the rows of a text and a
    frame rate. `attentions` are the names of the blocks' self-attentions; `skipping` turns a processor of
    theirs into one that skips it in the last row (stg-a).
    """

    arguments: Callable[[Any, TextCondition, Workload, float], dict[str, Any]]
    attentions: tuple[str, ...]
    skipping: Callable[[Any], Any]
    source: str = "diffusers"


def diffusers_model(family: ModelFamily) -> DiffusersModel:
    """The family's entry; raises InvalidRequest if it has none."""
    if family.name not in _MODELS:
        raise InvalidRequest(
            f"checkpoint: expected a model of {', '.join(_MODELS)}, got {family.name}, which the benchmarks "
            "cannot compare with diffusers: use stg-trt bench build"
        )
    return _MODELS[family.name]


class ValuesOnlyInSkipRow:
    """stg-a as an attention processor: the stock one for the other rows, to_out(V) for the last."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(self, attn: Any, hidden_states: Tensor, *others: Any, **options: Any) -> Tensor:
        others, options = _chosen_rows((others, options), len(hidden_states), _ALL_BUT_LAST)
        attended = self.stock(attn, hidden_states[:-1], *others, **options)
        values = attn.to_out[0](attn.to_v(hidden_states[-1:]))
        return torch.cat([attended, values])


class GatedValuesInSkipRow:
    """The same for an attention whose heads may have gates; the rotary tables have a row each."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        *others: Any,
        perturbation_mask: Any = None,
        all_perturbed: Any = None,
    ) -> Tensor:
        plain = _chosen_rows(others, len(hidden_states), _ALL_BUT_LAST)
        attended = self.stock(attn, hidden_states[:-1], *plain)
        skipped = hidden_states[-1:]
        values = attn.to_v(skipped)
        if attn.to_gate_logits is not None:
            gates = 2 * torch.sigmoid(attn.to_gate_logits(skipped))
            values = (values.unflatten(2, (attn.heads, -1)) * gates[..., None]).flatten(2)
        return torch.cat([attended, attn.to_out[0](values)])


class ProjectedValuesInSkipRow:
    """The same for an attention with one product for queries, keys and values."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(self, attn: Any, hidden_states: Tensor, rope: Any) -> Tensor:
        values = attn.proj(attn.value(hidden_states[-1:]))
        return torch.cat([self.stock(attn, hidden_states[:-1], rope), values])


class VideoSeesTextInSkipRow:
    """stg-a of a joint attention, as a processor: the stock one, in the last row under a mask over all pairs.

    There, video tokens see themselves and the text, and no other video token.
    """

    text_first: ClassVar[bool] = False

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __call__(
        self, attn: Any, hidden_states: Tensor, *others: Any, image_rotary_emb: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        # Named, since diffusers' Attention passes on only what its processor names.
        options["image_rotary_emb"] = image_rotary_emb

        def attended(rows: slice) -> tuple[Tensor, Tensor]:
            arguments, named = _chosen_rows((others, options), len(hidden_states), rows)
            streams: tuple[Tensor, Tensor] = self.stock(attn, hidden_states[rows], *arguments, **named)
            return streams

        plain = attended(_ALL_BUT_LAST)
        tokens = hidden_states.shape[1]
        with _MaskedVideo(slice(-tokens, None) if self.text_first else slice(tokens)):
            skipped = attended(slice(-1, None))
        return torch.cat([plain[0], skipped[0]]), torch.cat([plain[1], skipped[1]])


class TextFirstInSkipRow(VideoSeesTextInSkipRow):
    """The same if the text's tokens come before the video's."""

    text_first = True


class _MaskedVideo(TorchFunctionMode):
    """Attention inside the context: the tokens of `video` see themselves and all that are not video."""

    def __init__(self, video: slice) -> None:
        super().__init__()
        self.video = video

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        options = dict(kwargs or {})
        query = args[0] if args else options["query"]
        seen = torch.ones(2 * (query.shape[2],), dtype=torch.bool, device=query.device)
        own = seen[self.video, self.video]
        own.copy_(torch.eye(len(own), dtype=torch.bool, device=query.device))
        if options.get("attn_mask") is not None:
            seen = seen & options["attn_mask"]
        return func(*args, **options | {"attn_mask": seen})


_ALL_BUT_LAST = slice(None, -1)


def _chosen_rows(given: Any, rows: int, chosen: slice) -> Any:
    """Arguments with some rows of the tensors that have `rows`; a table for all rows stays."""
    if isinstance(given, Tensor):
        return given[chosen] if len(given) == rows else given
    if isinstance(given, dict):
        return {name: _chosen_rows(value, rows, chosen) for name, value in given.items()}
    return tuple(_chosen_rows(value, rows, chosen) for value in given) if isinstance(given, tuple) else given


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


def _ltx2_arguments(
    family: Any, text: TextCondition, workload: Workload, frame_rate: float
) -> dict[str, Any]:
    _, frames, height, width = family.latent_shape(workload)
    return {
        "encoder_hidden_states": text.embeds,
        "audio_encoder_hidden_states": text.audio,
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": frame_rate,
        "audio_num_frames": workload.audio_num_frames,
        "use_cross_timestep": True,
    }


def _wan_arguments(family: Any, text: TextCondition, workload: Workload, frame_rate: float) -> dict[str, Any]:
    # Its pipeline pads with zeros and passes no mask.
    return {"encoder_hidden_states": text.embeds * text.mask[:, :, None].to(text.embeds)}


def _hunyuan_video_arguments(
    family: Any, text: TextCondition, workload: Workload, frame_rate: float
) -> dict[str, Any]:
    return {
        "encoder_hidden_states": text.embeds,
        "encoder_attention_mask": text.mask,
        "pooled_projections": text.pooled,
        "guidance": text.mask.new_full((len(text.mask),), 1000.0 * family.embedded_guidance),
    }


def _cogvideox_arguments(
    family: Any, text: TextCondition, workload: Workload, frame_rate: float
) -> dict[str, Any]:
    tables = family.position_tables(workload, frame_rate)
    halves = [tables[name].to(text.embeds.device) for name in ("rope_cos", "rope_sin") if name in tables]
    rope = tuple(half.repeat_interleave(2, -1) for half in halves)
    return {"encoder_hidden_states": text.embeds, "image_rotary_emb": rope or None}


def _mochi_arguments(
    family: Any, text: TextCondition, workload: Workload, frame_rate: float
) -> dict[str, Any]:
    return {"encoder_hidden_states": text.embeds, "encoder_attention_mask": text.mask}


def _open_sora_arguments(
    family: Any, text: TextCondition, workload: Workload, frame_rate: float
) -> dict[str, Any]:
    place = text.embeds.device
    tables = {name: one.to(place) for name, one in family.position_tables(workload, frame_rate).items()}
    return {
        "encoder_hidden_states": text.embeds,
        "text_bias": family.text_inputs(text, workload)["text_bias"].to(text.embeds),
        "rope": (tables.pop("rope_cos"), tables.pop("rope_sin")),
        **tables,
    }


_MODELS = {
    "hunyuan-video": DiffusersModel(_hunyuan_video_arguments, ("attn",), VideoSeesTextInSkipRow),
    "cogvideox": DiffusersModel(_cogvideox_arguments, ("attn1",), TextFirstInSkipRow),
    "ltx-2": DiffusersModel(_ltx2_arguments, ("attn1", "audio_attn1"), GatedValuesInSkipRow),
    "ltx-video": DiffusersModel(_ltx_video_arguments, ("attn1",), ValuesOnlyInSkipRow),
    "open-sora": DiffusersModel(
        _open_sora_arguments, ("attn",), ProjectedValuesInSkipRow, source="our own module, uncut"
    ),
    "mochi": DiffusersModel(_mochi_arguments, ("attn1",), VideoSeesTextInSkipRow),
    "wan2.1": DiffusersModel(_wan_arguments, ("attn1",), ValuesOnlyInSkipRow),
    "wan2.2": DiffusersModel(_wan_arguments, ("attn1",), ValuesOnlyInSkipRow),
}
