"""The parts of the small pipeline, before training: tokenizer, T5 encoder, VAE, transformer, scheduler."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from .clips import VOCABULARY

WIDTH = 128
LATENT_CHANNELS = 64
PATCH = 12
PATCH_FRAMES = 4
"""Of a latent position: pixels along each side, and frames."""
PADDING_ID = 0


def make_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer whose pieces are the whole words of the captions."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [("\u2581" + word, -1.0) for word in VOCABULARY]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=128)


def make_text_encoder(vocabulary_size: int) -> T5EncoderModel:
    """A one-layer T5 encoder in which no word attends to padding."""
    config = T5Config(
        vocab_size=vocabulary_size,
        d_model=WIDTH,
        d_kv=64,
        d_ff=2 * WIDTH,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=PADDING_ID,
        eos_token_id=1,
    )
    encoder = T5EncoderModel(config)
    hide_padding(encoder)
    return encoder


@torch.no_grad()
def hide_padding(encoder: T5EncoderModel) -> None:
    """Give padding an attention score so low that the number of padding tokens changes nothing.

    LTXPipeline calls its text encoder without an attention mask, so padding has to be recognised by the
    weights: channel 0 of an embedding tells words (+) from padding (-), and in each head the first query
    and key channel read it. The projections stay as they are here in training (see `freeze_attention`).
    """
    embedding = encoder.get_input_embeddings().weight
    embedding[:, 0] = 4.0
    embedding[PADDING_ID, 0] = -4.0
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    for projection in (attention.q, attention.k):
        first_channels = slice(None, None, encoder.config.d_kv)
        projection.weight[first_channels] = 0.0
        projection.weight[first_channels, 0] = 1.5


def freeze_attention(encoder: T5EncoderModel) -> None:
    """Keep the query and key projections out of training, so that padding stays hidden."""
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    attention.q.weight.requires_grad_(False)
    attention.k.weight.requires_grad_(False)


def make_vae() -> AutoencoderKLLTXVideo:
    """An LTX VAE: 12x12 pixels of 4 frames become one latent position, and the first frame has its own.

    The encoder only rearranges pixels and multiplies by matrices, so its weights are computed rather than
    trained (see `linear_start`). The decoder has residual blocks at each of its three resolutions. It looks
    back in time only, so that the frames after a given picture do not change it.
    """
    return AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(28, 224, 224),
        down_block_types=("LTXVideo095DownBlock3D",) * 2,
        layers_per_block=(0, 0, 0),
        spatio_temporal_scaling=(True, True),
        downsample_type=("spatiotemporal",) * 2,
        decoder_block_out_channels=(32, 64),
        decoder_layers_per_block=(1, 1, 1),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        upsample_residual=(False,) * 2,
        upsample_factor=(1, 2),
        patch_size=PATCH // 4,
        patch_size_t=1,
        decoder_causal=True,
    )


def make_transformer() -> LTXVideoTransformer3DModel:
    """Eight LTX blocks of two heads of 64."""
    return LTXVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=WIDTH // 64,
        attention_head_dim=64,
        cross_attention_dim=WIDTH,
        num_layers=8,
        caption_channels=WIDTH,
    )


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The flow-matching scheduler with the settings of the published LTX-Video models."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )


class ShapesPipeline(LTXPipeline):  # type: ignore[misc]  # has no types
    """LTXPipeline for clips of 72x72: its own check wants multiples of 32, as the published VAE does."""

    def check_inputs(self, prompt: Any, height: int, width: int, **given: Any) -> None:
        """Check all that LTXPipeline checks, with multiples of the patch size instead."""
        if height % PATCH or width % PATCH:
            raise ValueError(
                f"height and width have to be multiples of {PATCH} but are {height} and {width}."
            )
        super().check_inputs(prompt, 32, 32, **given)
