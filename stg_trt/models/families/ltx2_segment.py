"""The segments of LTX-2: a video and its sound go through the blocks side by side and see each other in each.

What belongs to a stream has the same name for both, with a prefix for the sound's; in diffusers' blocks too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stg_trt.models.families.dit import DiTSegment, State, gated, rms_norm
from stg_trt.models.families.keep_flags import KEEP_ATTENTION, KEEP_AUDIO_ATTENTION, KEEP_CROSS
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.families.token_timesteps import of_tokens, token_timesteps

VIDEO, SOUND = "", "audio_"
STREAMS = (VIDEO, SOUND)
_KEEP = {VIDEO: KEEP_ATTENTION, SOUND: KEEP_AUDIO_ATTENTION}
# Of the three pairs of shift and scale in a block's table.
_SELF, _FEED_FORWARD, _TEXT = slice(0, 3), slice(3, 6), slice(6, 9)


@dataclass(frozen=True)
class Rope:
    """Cosines and sines of positions, (tokens, channels / 2) each."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, state: State, name: str) -> Rope:
        """The tables of a name."""
        return cls(state[f"{name}_cos"], state[f"{name}_sin"])

    def rotate(self, x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """(rows, tokens, channels), where the halves of every head are pairs, in float32, then in `dtype`."""
        a, b = x.unflatten(2, (heads, 2, -1)).unbind(3)
        cos, sin = (table.unflatten(1, (heads, -1)) for table in (self.cos, self.sin))
        halves = a * cos - b * sin, b * cos + a * sin
        return torch.stack([half.to(dtype) for half in halves], 3).flatten(2)


class TextProjections(SegmentModule):
    """Projects the prompt's embeddings for each stream, once per call."""

    def __init__(self, video: Any, sound: Any, *borders: Any) -> None:
        super().__init__(*borders)
        self.caption_projection, self.audio_caption_projection = video, sound

    def run(self, tensors: State) -> State:
        return {
            "text": self.caption_projection(tensors["prompt_video"]),
            "audio_text": self.audio_caption_projection(tensors["prompt_audio"]),
        }


class LTX2Segment(DiTSegment):
    """LTX2VideoTransformerBlocks; residuals in the compute dtype, modulation in float32."""

    flattens_grid = False

    def take_embedding(self, transformer: Any) -> None:
        config = transformer.config
        self.gate_factor = config.cross_attn_timestep_scale_multiplier / config.timestep_scale_multiplier
        self.proj_in, self.audio_proj_in = transformer.proj_in, transformer.audio_proj_in
        self.time_embed, self.audio_time_embed = transformer.time_embed, transformer.audio_time_embed
        self.cross_embed = transformer.av_cross_attn_video_scale_shift
        self.audio_cross_embed = transformer.av_cross_attn_audio_scale_shift
        self.gate_embed = transformer.av_cross_attn_video_a2v_gate
        self.audio_gate_embed = transformer.av_cross_attn_audio_v2a_gate
        if transformer.prompt_modulation:
            self.prompt_embed = transformer.prompt_adaln
            self.audio_prompt_embed = transformer.audio_prompt_adaln

    def take_head(self, transformer: Any) -> None:
        self.scale_shift_table = transformer.scale_shift_table
        self.audio_scale_shift_table = transformer.audio_scale_shift_table
        self.norm_out, self.audio_norm_out = transformer.norm_out, transformer.audio_norm_out
        self.proj_out, self.audio_proj_out = transformer.proj_out, transformer.audio_proj_out

    def latent_grid(self, latents: Tensor) -> tuple[int, ...]:
        """Latents are tokens already, (rows, tokens, channels)."""
        return tuple(latents.shape[1:-1])

    def embed(self, state: State) -> State:
        step = state["timestep"][:, None]
        # Tokens of the video may have a timestep of their own, the sound has the step's.
        timesteps = {VIDEO: token_timesteps(state), SOUND: step}
        made: State = {}
        for stream in STREAMS:
            made[f"{stream}hidden_states"] = getattr(self, f"{stream}proj_in")(state[f"{stream}latents"])
            time, embedded = self._modulation(f"{stream}time_embed", timesteps[stream])
            made[f"{stream}temb"], made[f"{stream}embedded_timestep"] = time, embedded
            made[f"{stream}cross_temb"], _ = self._modulation(f"{stream}cross_embed", timesteps[stream])
            made[f"{stream}cross_gate"], _ = self._modulation(f"{stream}gate_embed", step * self.gate_factor)
            if hasattr(self, "prompt_embed"):
                made[f"{stream}prompt_temb"], _ = self._modulation(f"{stream}prompt_embed", step)
        return made

    def _modulation(self, name: str, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """A network's modulation (rows, places, parameters, channels) and embedding of timesteps."""
        network = getattr(self, name)
        values, embedded = network(timesteps.flatten(), hidden_dtype=torch.float32)
        shape = (*timesteps.shape, network.num_mod_params, -1)
        return values.view(shape), embedded.unflatten(0, timesteps.shape)

    def block(self, block: Any, state: State, perturbed: bool) -> State:
        streams = {stream: state[f"{stream}hidden_states"] for stream in STREAMS}
        tables = {stream: self._table(block, stream, state) for stream in STREAMS}
        for stream in STREAMS:
            hidden = self._attend_to_self(block, stream, streams[stream], tables[stream], state, perturbed)
            streams[stream] = self._attend_to_text(block, stream, hidden, tables[stream], state)
        video, sound = self._exchange(block, streams[VIDEO], streams[SOUND], state)
        return {
            "hidden_states": _fed_forward(block, VIDEO, video, tables[VIDEO]),
            "audio_hidden_states": _fed_forward(block, SOUND, sound, tables[SOUND]),
        }

    def _table(self, block: Any, stream: str, state: State) -> list[Tensor]:
        """Shifts, scales and gates of a block, of (rows, 1 or tokens, channels) each."""
        table: Tensor = getattr(block, f"{stream}scale_shift_table") + state[f"{stream}temb"]
        return _per_token(stream, table, state)

    def _attend_to_self(
        self, block: Any, stream: str, hidden: Tensor, table: list[Tensor], state: State, perturbed: bool
    ) -> Tensor:
        shift, scale, gate = table[_SELF]
        normed = _modulated(getattr(block, f"{stream}norm1"), hidden, shift, scale)
        attn, rope = getattr(block, f"{stream}attn1"), f"{stream}rope"
        if perturbed:
            mixed = attn.to_v(normed)
        else:
            positions = Rope.of(state, rope)
            mixed = self.attention(attn, normed, normed, positions, positions, state.get(_KEEP[stream]))
        return gated(hidden, _gated_output(attn, normed, mixed), gate)

    def _attend_to_text(
        self, block: Any, stream: str, hidden: Tensor, table: list[Tensor], state: State
    ) -> Tensor:
        text, norm = state[f"{stream}text"], getattr(block, f"{stream}norm2")
        attn = getattr(block, f"{stream}attn2")
        if len(table) < _TEXT.stop:
            normed = rms_norm(norm, hidden).to(hidden.dtype)
            return hidden + _gated_output(attn, normed, self.attention(attn, normed, text))
        shift, scale, gate = table[_TEXT]
        normed = _modulated(norm, hidden, shift, scale)
        prompt = getattr(block, f"{stream}prompt_scale_shift_table") + state[f"{stream}prompt_temb"]
        text_shift, text_scale = prompt.unbind(2)
        text = (text.float() * (1 + text_scale) + text_shift).to(text.dtype)
        return gated(hidden, _gated_output(attn, normed, self.attention(attn, normed, text)), gate)

    def _exchange(self, block: Any, video: Tensor, sound: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Each stream attends to the other, as both were before; rows that are isolated do not."""
        normed = {VIDEO: block.audio_to_video_norm, SOUND: block.video_to_audio_norm}
        normed = {
            stream: rms_norm(norm, hidden)
            for (stream, norm), hidden in zip(normed.items(), (video, sound), strict=True)
        }
        tables = {stream: _cross_table(block, stream, state) for stream in STREAMS}
        results = []
        for place, (stream, other, attn) in enumerate((
            (VIDEO, SOUND, block.audio_to_video_attn),
            (SOUND, VIDEO, block.video_to_audio_attn),
        )):  # fmt: skip
            # Scale and shift of the video's attention to the sound come first, for both.
            part = slice(2 * place, 2 * place + 2)
            query, context = (
                (normed[one] * (1 + tables[one][part][0]) + tables[one][part][1]).to(video.dtype)
                for one in (stream, other)
            )
            ropes = [Rope.of(state, f"{one}cross_rope") for one in (stream, other)]
            update = _gated_output(attn, query, self.attention(attn, query, context, ropes[0], ropes[1]))
            results.append(_kept(update.float() * tables[stream][4], state))
        of_video, of_sound = results
        return video + of_video.to(video.dtype), sound + of_sound.to(sound.dtype)

    def attention(
        self,
        attn: Any,
        x: Tensor,
        context: Tensor,
        query_rope: Rope | None = None,
        key_rope: Rope | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """What tokens read of a context, before the output; rows that `keep` is false for have the values."""
        query, key = rms_norm(attn.norm_q, attn.to_q(x)), rms_norm(attn.norm_k, attn.to_k(context))
        value = attn.to_v(context)
        if query_rope is not None and key_rope is not None:
            query = query_rope.rotate(query, attn.heads, x.dtype)
            key = key_rope.rotate(key, attn.heads, x.dtype)
        mixed = self.heads(attn, query.to(x.dtype), key.to(x.dtype), value)
        return mixed if keep is None else torch.where(keep[:, None, None], mixed, value)

    def head(self, state: State) -> Tensor:
        state["audio_pred"] = self._predicted(SOUND, state)
        return self._predicted(VIDEO, state)

    def _predicted(self, stream: str, state: State) -> Tensor:
        hidden = state[f"{stream}hidden_states"]
        table = getattr(self, f"{stream}scale_shift_table")
        modulation = state[f"{stream}embedded_timestep"].unsqueeze(2) + table
        shift, scale = _per_token(stream, modulation, state)
        normed = getattr(self, f"{stream}norm_out")(hidden.float()) * (1 + scale) + shift
        pred: Tensor = getattr(self, f"{stream}proj_out")(normed.to(hidden.dtype))
        return pred


def _per_token(stream: str, table: Tensor, state: State) -> list[Tensor]:
    """Parameters of (rows, places, parameters, channels), each for the tokens of a stream."""
    parameters = table.unbind(2)
    return of_tokens(parameters, state) if stream == VIDEO else [*parameters]


def _cross_table(block: Any, stream: str, state: State) -> list[Tensor]:
    """Two scales with their shifts, and the gate of what the stream reads of the other."""
    name = "audio_a2v" if stream == SOUND else "video_a2v"
    table: Tensor = getattr(block, f"{name}_cross_attn_scale_shift_table")
    scales = _per_token(stream, table[:4] + state[f"{stream}cross_temb"], state)
    gate: Tensor = table[4:] + state[f"{stream}cross_gate"]
    return [*scales, gate[:, :, 0]]


def _modulated(norm: Any, hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (rms_norm(norm, hidden) * (1 + scale) + shift).to(hidden.dtype)


def _gated_output(attn: Any, x: Tensor, mixed: Tensor) -> Tensor:
    """The output of an attention, whose heads the tokens that read may gate, 2*sigmoid each."""
    if attn.to_gate_logits is not None:
        gates = 2 * torch.sigmoid(attn.to_gate_logits(x).float())
        mixed = (mixed.unflatten(2, (attn.heads, -1)).float() * gates[..., None]).flatten(2).to(x.dtype)
    out: Tensor = attn.to_out[0](mixed)
    return out


def _kept(update: Tensor, state: State) -> Tensor:
    """The update of rows whose streams see each other, 0 for the others."""
    return torch.where(state[KEEP_CROSS][:, None, None], update, 0.0)


def _fed_forward(block: Any, stream: str, hidden: Tensor, table: list[Tensor]) -> Tensor:
    shift, scale, gate = table[_FEED_FORWARD]
    normed = _modulated(getattr(block, f"{stream}norm3"), hidden, shift, scale)
    return gated(hidden, getattr(block, f"{stream}ff")(normed), gate)
