"""Inputs that switch a part of a segment off for some rows: a bool per row, false where it is skipped."""

from __future__ import annotations

from stg_trt.models.tensor_spec import ROWS, TensorSpec

KEEP_ATTENTION = "keep_attention"
KEEP_AUDIO_ATTENTION = "keep_audio_attention"
KEEP_CROSS = "keep_cross"
KEEP_LAYER = "keep_layer"
KEEP_FLAGS = (KEEP_ATTENTION, KEEP_AUDIO_ATTENTION, KEEP_CROSS, KEEP_LAYER)


def keep_attention_spec() -> TensorSpec:
    """False for the rows whose self-attention is skipped."""
    return TensorSpec(KEEP_ATTENTION, "bool", (ROWS,))


def keep_audio_attention_spec() -> TensorSpec:
    """The same for the self-attention of a sound."""
    return TensorSpec(KEEP_AUDIO_ATTENTION, "bool", (ROWS,))


def keep_cross_spec() -> TensorSpec:
    """False for the rows whose video and sound do not see each other."""
    return TensorSpec(KEEP_CROSS, "bool", (ROWS,))


def keep_layer_spec() -> TensorSpec:
    """False for the rows whose self-attention layer returns its input."""
    return TensorSpec(KEEP_LAYER, "bool", (ROWS,))
