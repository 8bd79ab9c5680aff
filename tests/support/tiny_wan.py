"""The tiny transformer of Wan checkpoints without text encoders."""

from __future__ import annotations

from typing import Any

from diffusers import UniPCMultistepScheduler, WanTransformer3DModel


def tiny_wan(**changes: Any) -> WanTransformer3DModel:
    """Three blocks; text-to-video in four channels unless told otherwise."""
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 3,
        "cross_attn_norm": True,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**config | changes)


def unipc(shift: float) -> UniPCMultistepScheduler:
    """The scheduler of published checkpoints."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
