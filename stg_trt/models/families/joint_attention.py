"""Diffusion transformers whose blocks attend over video and text tokens together (MMDiT).

Both streams, video and text, cross a cut, and so does the embedded timestep `temb` that blocks and head read.
A perturbed block (stg-a) lets each video token see itself and the text, no other video token; the text sees
everything.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stg_trt.models.families.dit import DiT, DiTSegment, State, gated, rms_norm, rotate
from stg_trt.models.families.keep_flags import KEEP_ATTENTION
from stg_trt.models.segment import Segment
from stg_trt.models.workload import Workload

# Queries of the perturbed attention whose logits to the text are in memory at once.
_CHUNK = 2048
# Added to the logits of a text token that is padding.
MASKED = -10000.0
_STREAMS = ("hidden_states", "encoder_hidden_states")


class QKV(NamedTuple):
    """Queries, keys and values of one stream, (rows, heads, tokens, head size) each."""

    query: Tensor
    key: Tensor
    value: Tensor


class KV(NamedTuple):
    """Keys and values of a stream that does not attend itself, as in QKV."""

    key: Tensor
    value: Tensor


class JointAttentionDiT(DiT):
    """Borders and costs; a subclass adds its own tensors and writes its blocks out."""

    # Inputs of the front beside latents and timestep: for the video stream, the text stream, and temb.
    video_constants: tuple[str, ...] = ()
    text_constants: ClassVar[tuple[str, ...]]
    temb_constants: tuple[str, ...] = ()
    text_borders: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = (("prompt_embeds",), ("text",))

    @abstractmethod
    def text_flops(self, workload: Workload) -> int:
        """Operations of the text segment for one row; 0 without one."""

    @abstractmethod
    def front_flops(self, workload: Workload) -> int:
        """Operations of the embedding for one row."""

    @abstractmethod
    def block_flops(self, block: int, workload: Workload) -> int:
        """Operations of one block for one row, all but its attention's two products."""

    def reads_into_text(self, block: int) -> bool:
        """True if the block also updates the text stream."""
        return True

    @abstractmethod
    def back_flops(self, workload: Workload) -> int:
        """Operations of the head for one row."""

    def borders(self, segment: Segment) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if segment.text:
            return self.text_borders
        constants = self.block_constants if self._running(segment) else ()
        if segment.front:
            # Without a block to read it, the text stream of a whole model is not made.
            text = self.text_constants if self._running(segment) or not segment.back else ()
            made = (*self.video_constants, *text, *self.temb_constants, *constants)
            inputs = ("latents", "timestep", *dict.fromkeys(made))
        else:
            streams = _STREAMS if segment.blocks else _STREAMS[:1]
            inputs = (*streams, "temb", *constants)
        if segment.keep_input:
            inputs += (KEEP_ATTENTION,)
        if segment.back:
            return inputs, ("pred",)
        return inputs, (*_STREAMS, "temb") if segment.front else _STREAMS

    def segment_flops(self, segment: Segment, workload: Workload) -> int:
        if segment.text:
            return self.text_flops(workload)
        tokens, text = self.tokens(workload), workload.text_length
        by_video = 4 * tokens * (tokens + text) * self.width
        by_text = 4 * text * (tokens + text) * self.width
        # A token's products with its own key and value are no matrix products.
        self_and_text = 4 * tokens * text * self.width
        total = 0
        for block in self._running(segment):
            total += self.block_flops(block, workload)
            total += by_text if self.reads_into_text(block) else 0
            total += self_and_text if self._perturbed(segment, block) else by_video
            total += self_and_text if segment.keep_input else 0
        total += self.front_flops(workload) if segment.front else 0
        return total + (self.back_flops(workload) if segment.back else 0)

    def key_bias(self, mask: Tensor, workload: Workload) -> Tensor:
        """(rows, 1, 1, video and text tokens), 0 except for padding, from the text's mask (rows, tokens)."""
        return F.pad((1 - mask) * MASKED, (self.tokens(workload), 0))[:, None, None, :]

    def attentions(self, segment: Segment) -> int:
        # The perturbed video tokens' softmax over self and text is written out; the text's is a kernel.
        running = self._running(segment)
        return sum(self.reads_into_text(b) or not self._perturbed(segment, b) for b in running)

    def activation_limit(self, segment: Segment, workload: Workload, rows: int) -> int:
        # Widest point: both streams' q, k, v and the feed-forward, each allowed a float32 copy.
        tokens = self.tokens(workload) + workload.text_length
        linear = rows * tokens * (12 * self.width + self.feed_forward_width) * 4
        perturbed = segment.keep_input or (segment.skipped is not None and segment.skipped.mode == "stg-a")
        heads = self.integer("num_attention_heads") if perturbed else 0
        return linear + 3 * rows * heads * _CHUNK * (workload.text_length + 1) * 4 + (8 << 20)

    def _perturbed(self, segment: Segment, block: int) -> bool:
        return segment.skipped is not None and block in segment.skipped.blocks

    def _running(self, segment: Segment) -> tuple[int, ...]:
        """The blocks that are computed: all but those that stg-r skips."""
        left_out = segment.skipped is not None and segment.skipped.mode == "stg-r"
        return tuple(block for block in segment.blocks if not (left_out and self._perturbed(segment, block)))


class JointAttentionSegment(DiTSegment):
    """Blocks of which the attention mixes video and text tokens."""

    def joint_attention(self, video: QKV, text: QKV, state: State, perturbed: bool) -> tuple[Tensor, Tensor]:
        """Both streams' attention over both, (rows, tokens, channels) each.

        `key_bias` of the state, (rows, 1, 1, video and text tokens), is added to the logits if the state has
        it. Rows without keep_attention, or all where `perturbed`, see what stg-a lets them see.
        """
        key, value = _both(video.key, text.key), _both(video.value, text.value)
        bias, tokens = state.get("key_bias"), video.query.shape[2]
        if perturbed:
            video_out = _perturbed(video, text, state)
            text_out = self.attend(text.query, key, value, bias)
        else:
            out = self.attend(_both(video.query, text.query), key, value, bias)
            video_out, text_out = _kept(out[:, :, :tokens], video, text, state), out[:, :, tokens:]
        return _merged(video_out), _merged(text_out)

    def video_attention(self, video: QKV, text: QKV | KV, state: State, perturbed: bool) -> Tensor:
        """The video's half of joint_attention, for a block that leaves the text stream as it is."""
        if perturbed:
            return _merged(_perturbed(video, text, state))
        key, value = _both(video.key, text.key), _both(video.value, text.value)
        out = self.attend(video.query, key, value, state.get("key_bias"))
        return _merged(_kept(out, video, text, state))


def modulation(linear: Any, temb: Tensor) -> Tensor:
    """(rows, 1, channels) in float32, projected in the dtype of the weights, which are many."""
    projected: Tensor = linear(F.silu(temb).to(linear.weight.dtype))
    return projected.float().unsqueeze(1)


def split_heads(attn: Any, linear: nn.Module, x: Tensor) -> Tensor:
    """A projection of (rows, tokens, channels) as (rows, heads, tokens, head size)."""
    heads: Tensor = linear(x).unflatten(2, (attn.heads, -1)).transpose(1, 2)
    return heads


def modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift, in float32."""
    result: Tensor = norm(x.float()) * (1 + scale) + shift
    return result.to(x.dtype)


def feed_forward(norm: Any, ff: Any, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    """The modulated feed-forward of one stream."""
    return gated(x, ff(modulated(norm, x, shift, scale)), gate)


def projected(attn: Any, x: Tensor, names: Sequence[str]) -> list[Tensor]:
    """Heads of one stream's queries, keys and values."""
    return [split_heads(attn, getattr(attn, name), x) for name in names[:3]]


def normed_qkv(attn: Any, x: Tensor, names: Sequence[str]) -> QKV:
    """Queries and keys of one stream, RMS-normed per head in float32, and its values."""
    query, key, value = projected(attn, x, names)
    return QKV(rms_norm(getattr(attn, names[3]), query), rms_norm(getattr(attn, names[4]), key), value)


def rotated(qkv: QKV, state: State, dtype: torch.dtype) -> QKV:
    """Queries and keys rotated by their positions, in float32, then in `dtype`."""
    rope = state["rope_cos"], state["rope_sin"]
    return QKV(rotate(qkv.query, *rope, dtype), rotate(qkv.key, *rope, dtype), qkv.value)


def _both(video: Tensor, text: Tensor) -> Tensor:
    """The tokens of both streams, (rows, heads, tokens, head size)."""
    return torch.cat([video, text], 2)


def _merged(heads: Tensor) -> Tensor:
    """(rows, heads, tokens, head size) to (rows, tokens, channels)."""
    return heads.transpose(1, 2).flatten(2)


def _kept(attended: Tensor, video: QKV, text: QKV | KV, state: State) -> Tensor:
    """The video's attention, but the perturbed one in rows without keep_attention."""
    if KEEP_ATTENTION not in state:
        return attended
    return torch.where(state[KEEP_ATTENTION][:, None, None, None], attended, _perturbed(video, text, state))


def _perturbed(video: QKV, text: QKV | KV, state: State) -> Tensor:
    """The video's attention under stg-a, with the part of `key_bias` that is the text's."""
    bias = state.get("key_bias")
    return self_and_text(video, text, None if bias is None else bias[..., video.query.shape[2] :])


def self_and_text(video: QKV, text: QKV | KV, bias: Tensor | None) -> Tensor:
    """softmax([q.k_self, q.K_text + bias]) [v_self, V_text] per video token, in float32 and in O(N*T)."""
    key, value = text.key.float().transpose(-1, -2), text.value.float()
    outputs = []
    for start in range(0, video.query.shape[2], _CHUNK):
        query, own_key, own_value = (x[:, :, start : start + _CHUNK].float() for x in video)
        query = query * query.shape[-1] ** -0.5
        logits = query @ key
        if bias is not None:
            logits = logits + bias.float()
        own = (query * own_key).sum(-1, keepdim=True)
        weights = torch.cat([own, logits], -1).softmax(-1)
        outputs.append(weights[..., :1] * own_value + weights[..., 1:] @ value)
    return torch.cat(outputs, 2).to(video.value.dtype)
