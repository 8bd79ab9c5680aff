"""Blocks with a table of modulation each, to which one made of the timestep is added, of all tokens or each.

Their self-attention has RoPE in pairs of neighbouring channels; what CLIP sees of pictures is tokens of the
cross-attention beside the text's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stg_trt.models.families.base import CONDITION, IMAGE_EMBEDS
from stg_trt.models.families.cross_attention import CrossAttentionSegment
from stg_trt.models.families.dit import State, gated, rotate, unpatched
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.families.token_timesteps import (
    TIMESTEP_INDEX,
    TIMESTEP_LIMITS,
    of_tokens,
    token_timesteps,
)

IMAGE_TEXT = "image_text"


class ModulatedSegment(CrossAttentionSegment):
    """Residuals and modulation in float32, the rest in the compute dtype."""

    def take_embedding(self, transformer: Any) -> None:
        embedder = transformer.condition_embedder
        self.patch_embedding = transformer.patch_embedding
        self.timesteps_proj, self.time_embedder = embedder.timesteps_proj, embedder.time_embedder
        self.time_proj = embedder.time_proj

    def take_head(self, transformer: Any) -> None:
        self.scale_shift_table = transformer.scale_shift_table
        self.norm_out, self.proj_out = transformer.norm_out, transformer.proj_out

    def embed(self, state: State) -> State:
        latents = state["latents"]
        if CONDITION in state:
            latents = torch.cat([latents, state[CONDITION]], 1)
        if TIMESTEP_LIMITS in state:
            timesteps = token_timesteps(state)
            temb = self.time_embedder(self.timesteps_proj(timesteps.flatten())).unflatten(0, timesteps.shape)
        else:
            temb = self.time_embedder(self.timesteps_proj(state["timestep"]))
        return {
            "hidden_states": self.patch_embedding(latents).flatten(2).transpose(1, 2),
            "modulation": self.time_proj(torch.nn.functional.silu(temb)).unflatten(temb.ndim - 1, (6, -1)),
            "temb": temb,
        }

    def block(self, block: Any, state: State, perturbed: bool) -> State:
        hidden = state["hidden_states"]
        dtype = hidden.dtype
        modulation: Tensor = block.scale_shift_table + state["modulation"]
        shift, scale, gate, shift_ff, scale_ff, gate_ff = _parts(modulation, state)
        normed = (block.norm1(hidden.float()) * (1 + scale) + shift).to(dtype)
        attended = self.self_attention(block.attn1, normed, state, perturbed)
        hidden = gated(hidden, attended, gate)
        normed = block.norm2(hidden.float()).to(dtype)
        hidden = hidden + self.cross_attention(
            block.attn2, normed, state["text"], image=state.get(IMAGE_TEXT)
        )
        normed = (block.norm3(hidden.float()) * (1 + scale_ff) + shift_ff).to(dtype)
        return {"hidden_states": gated(hidden, block.ffn(normed), gate_ff)}

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        heads = x.unflatten(2, (-1, 2 * cos.shape[-1]))
        return rotate(heads, cos[:, None], sin[:, None], dtype).flatten(2)

    def head(self, state: State) -> Tensor:
        hidden = state["hidden_states"]
        temb = state["temb"]
        shift, scale = _parts(self.scale_shift_table + temb.unsqueeze(temb.ndim - 1), state)
        normed = self.norm_out(hidden.float()) * (1 + scale) + shift
        pred: Tensor = self.proj_out(normed.to(hidden.dtype))
        return pred

    def unpatch(self, pred: Tensor, grid: tuple[int, ...]) -> Tensor:
        return unpatched(pred, grid, self.patch)


def _parts(modulation: Tensor, state: State) -> Sequence[Tensor]:
    """Shifts, scales and gates (rows, tokens or 1, width) of a table (rows, [timesteps,] parts, width)."""
    if TIMESTEP_INDEX in state:
        return of_tokens(modulation.unbind(2), state)
    return modulation.chunk(modulation.shape[1], dim=1)


class PromptText(SegmentModule):
    """The projected prompt, and beside it what CLIP sees in the pictures."""

    def __init__(self, embedder: Any, *borders: Any) -> None:
        super().__init__(*borders)
        self.projection, self.image = embedder.text_embedder, embedder.image_embedder

    def run(self, tensors: State) -> State:
        made: State = {"text": self.projection(tensors["prompt_embeds"])}
        if self.image is not None:
            seen, positions = tensors[IMAGE_EMBEDS], self.image.pos_embed
            seen = self.image.norm1(seen if positions is None else seen + positions)
            made[IMAGE_TEXT] = self.image.norm2(self.image.ff(seen))
        return made
