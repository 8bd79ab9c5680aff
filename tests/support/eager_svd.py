"""Stable Video Diffusion with STG written plainly on diffusers' UNet: the reference for engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stg_trt.models.perturbation import Perturbation


@contextmanager
def perturbed(unet: Any, one: Perturbation | None) -> Iterator[None]:
    """Diffusers' UNet with perturbed self-attentions, restored afterwards; None changes nothing."""
    chosen = [] if one is None else [self_attentions(unet)[block] for block in one.blocks]
    try:
        for attn in chosen:
            attn.forward = _unchanged if one is not None and one.mode == "stg-r" else _values_only(attn)
        yield
    finally:
        for attn in chosen:
            del attn.forward


def self_attentions(unet: Any) -> list[Any]:
    """Spatial and temporal in turn, in running order; the first block of the decoder has none."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    modules = [module for block in blocks for module in getattr(block, "attentions", ())]
    halves = [(one.transformer_blocks[0].attn1, one.temporal_transformer_blocks[0].attn1) for one in modules]
    return [attn for pair in halves for attn in pair]


def _unchanged(hidden_states: Tensor, **unused: Any) -> Tensor:
    return hidden_states


def _values_only(attn: Any) -> Any:
    def forward(hidden_states: Tensor, **unused: Any) -> Tensor:
        out: Tensor = attn.to_out[0](attn.to_v(hidden_states))
        return out

    return forward


@dataclass(frozen=True)
class Call:
    """What a picture adds, and the noise before the scheduler's factor; a row per video."""

    image_embeddings: Tensor
    image_latents: Tensor
    latents: Tensor
    fps: float = 7.0
    motion_bucket_id: float = 127.0
    noise_aug_strength: float = 0.02

    def predict(self, unet: Any, scaled: Tensor, timestep: Tensor, *, seen: bool = True) -> Tensor:
        """One pass; without the picture if it is not seen."""
        embeddings, latents = self.image_embeddings * seen, self.image_latents * seen
        ids = torch.tensor([[self.fps - 1, self.motion_bucket_id, self.noise_aug_strength]])
        channels = latents[:, None].expand(-1, scaled.shape[1], -1, -1, -1)
        pred: Tensor = unet(
            torch.cat([scaled, channels], 2),
            timestep,
            encoder_hidden_states=embeddings,
            added_time_ids=ids.expand(len(scaled), -1),
            return_dict=False,
        )[0]
        return pred


@torch.no_grad()
def sample(
    unet: Any,
    scheduler: Any,
    call: Call,
    skips: Sequence[tuple[float, Perturbation]],
    *,
    steps: int,
    low: float = 1.0,
    high: float = 3.0,
    rescale: float = 0.0,
) -> list[Tensor]:
    """Latents after every step: uncond + g_f*(cond - uncond) + sum_k s_k*(cond - skip_k)."""
    scheduler.set_timesteps(steps)
    latents, taken = call.latents * scheduler.init_noise_sigma, []
    scale = torch.linspace(low, high, latents.shape[1])[:, None, None, None]
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        pred = cond = call.predict(unet, scaled, timestep)
        if high > 1:
            uncond = call.predict(unet, scaled, timestep, seen=False)
            pred = uncond + scale * (cond - uncond)
        for strength, one in skips:
            with perturbed(unet, one):
                pred = pred + strength * (cond - call.predict(unet, scaled, timestep))
        if rescale:
            every = tuple(range(1, pred.ndim))
            factor = cond.std(every, keepdim=True) / pred.std(every, keepdim=True)
            pred = pred * (rescale * factor + 1 - rescale)
        latents = scheduler.step(pred, timestep, latents).prev_sample
        taken.append(latents)
    return taken


def distance(got: Tensor, expected: Tensor) -> float:
    """Relative to the largest latent: at sigma 700, rounding alone is above 1e-4."""
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1))
