"""Whole tiny checkpoints of LTX-2 and LTX-2.3: text encoder, connectors, transformer, VAEs and vocoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder, LTX2VocoderWithBWE
from torch import Tensor, nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaTokenizer,
    SiglipVisionConfig,
)

from tests.support.family_cases.tiny_text import WORDS

VERSIONS = ("2.0", "2.3")
# Gemma's; the hidden states of all its layers and of its embedding are the prompt's embeddings.
TEXT_WIDTH, TEXT_LAYERS = 16, 2
EMBEDS_WIDTH = TEXT_WIDTH * (TEXT_LAYERS + 1)
WIDTH, AUDIO_WIDTH = 48, 24
CHANNELS = 8
# The sound's latents: as many as published, of fewer mel bins.
SOUND_CHANNELS, MEL_BINS = 8, 8
AUDIO_CHANNELS = SOUND_CHANNELS * MEL_BINS // 4
# The text length must be a multiple of it.
REGISTERS = 4
# Published 2.0: no guidance of attention by gates, and prompts that the transformer projects.
_NEW = {"2.0": False, "2.3": True}
SCHEDULE = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}


def save_ltx2(folder: Path, version: str) -> None:
    """A checkpoint of one of VERSIONS."""
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    pipeline = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULE),
        vae=video_vae(),
        audio_vae=audio_vae(),
        text_encoder=tiny_gemma(len(tokenizer)),
        tokenizer=tokenizer,
        connectors=connectors(version),
        transformer=transformer(version),
        vocoder=vocoder(version),
    )
    pipeline.save_pretrained(folder)


def diffusers_pipeline(folder: Path) -> LTX2Pipeline:
    """diffusers' own pipeline, which can perturb 2.0 too."""
    model = LTX2VideoTransformer3DModel.from_pretrained(folder, subfolder="transformer", perturbed_attn=True)
    pipeline = LTX2Pipeline.from_pretrained(folder, transformer=model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_pipeline() -> LTX2Pipeline:
    """With text encoder and tokenizer alone."""
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    rest = dict.fromkeys(("scheduler", "vae", "audio_vae", "connectors", "transformer", "vocoder"))
    return LTX2Pipeline(text_encoder=tiny_gemma(len(tokenizer)), tokenizer=tokenizer, **rest)


def decoding_pipeline(version: str, **vae_options: Any) -> LTX2Pipeline:
    """With what decodes alone; `vae_options` are entries of the configuration of the frames' VAE."""
    torch.manual_seed(0)
    rest = dict.fromkeys(("scheduler", "text_encoder", "tokenizer", "connectors", "transformer"))
    return LTX2Pipeline(vae=video_vae(**vae_options), audio_vae=audio_vae(), vocoder=vocoder(version), **rest)


def gemma_tokenizer() -> GemmaTokenizer:
    """Whole words, with the space before them."""
    merges = [(word[:end], word[end]) for word in WORDS for end in range(1, len(word))]
    merges += [("\u2581", word) for word in WORDS]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *"".join(WORDS), *map("".join, merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return GemmaTokenizer(
        vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=64, add_bos_token=True
    )


def tiny_gemma(vocabulary: int, layers: int = TEXT_LAYERS) -> Gemma3ForConditionalGeneration:
    """Layers of which all but the last see a few tokens only."""
    text = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention"] * (layers - 1) + ["full_attention"],
    )
    eyes = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=1)
    return Gemma3ForConditionalGeneration(config).eval()


def connectors(version: str) -> LTX2TextConnectors:
    """2.0: one projection to the text encoder's width; 2.3: two, to the widths of the transformer."""
    new = _NEW[version]
    widths = (WIDTH, AUDIO_WIDTH) if new else (TEXT_WIDTH, TEXT_WIDTH)
    return _random(
        LTX2TextConnectors(
            caption_channels=TEXT_WIDTH,
            text_proj_in_factor=TEXT_LAYERS + 1,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=widths[0] // 2,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=REGISTERS,
            video_gated_attn=new,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=widths[1] // 2,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=REGISTERS,
            audio_gated_attn=new,
            rope_type="split",
            per_modality_projections=new,
            video_hidden_dim=WIDTH,
            audio_hidden_dim=AUDIO_WIDTH,
            proj_bias=new,
        )
    )


def transformer(version: str) -> LTX2VideoTransformer3DModel:
    """Three blocks. As published, 2.0's have no switch for diffusers to perturb them."""
    new = _NEW[version]
    return _random(
        LTX2VideoTransformer3DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=WIDTH // 2,
            cross_attention_dim=WIDTH,
            audio_in_channels=AUDIO_CHANNELS,
            audio_out_channels=AUDIO_CHANNELS,
            audio_num_attention_heads=2,
            audio_attention_head_dim=AUDIO_WIDTH // 2,
            audio_cross_attention_dim=AUDIO_WIDTH,
            num_layers=3,
            caption_channels=TEXT_WIDTH,
            rope_type="split",
            gated_attn=new,
            audio_gated_attn=new,
            cross_attn_mod=new,
            audio_cross_attn_mod=new,
            use_prompt_embeddings=not new,
            perturbed_attn=new,
        )
    )


def video_vae(**options: Any) -> AutoencoderKLLTX2Video:
    """8 pixels in time and 32 in space per latent."""
    vae = AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
        scaling_factor=0.8,
        **options,
    )
    _set_statistics(vae)
    return vae.eval()


def audio_vae() -> AutoencoderKLLTX2Audio:
    """Two channels of a mel spectrogram; 4 steps and 4 bins per latent."""
    vae = AutoencoderKLLTX2Audio(
        base_channels=AUDIO_CHANNELS,
        ch_mult=(1, 1, 1),
        num_res_blocks=1,
        latent_channels=SOUND_CHANNELS,
        resolution=MEL_BINS,
        mel_bins=MEL_BINS,
    )
    _set_statistics(vae)
    return _louder(vae)


def vocoder(version: str) -> LTX2Vocoder | LTX2VocoderWithBWE:
    """100 spectra to a second of stereo at 24 kHz, in 2.3 at 48 kHz after a first stage at 16 kHz."""
    first: dict[str, Any] = {
        "in_channels": 2 * MEL_BINS,
        "resnet_kernel_sizes": [3],
        "resnet_dilations": [[1, 3]],
    }
    if not _NEW[version]:
        return _louder(LTX2Vocoder(
            **first, hidden_channels=16, upsample_kernel_sizes=[16, 15, 16], upsample_factors=[6, 5, 8]
        ))  # fmt: skip
    made = LTX2VocoderWithBWE(
        **first,
        hidden_channels=16,
        upsample_kernel_sizes=[11, 4, 32],
        upsample_factors=[5, 2, 16],
        bwe_in_channels=2 * MEL_BINS,
        bwe_hidden_channels=16,
        bwe_upsample_kernel_sizes=[12, 11, 16],
        bwe_upsample_factors=[6, 5, 8],
        bwe_resnet_kernel_sizes=[3],
        bwe_resnet_dilations=[[1, 3]],
        num_mel_channels=MEL_BINS,
    )
    # Published files hold these, which the constructor leaves at zero.
    nn.init.normal_(made.mel_stft.stft_fn.forward_basis, std=0.05)
    nn.init.uniform_(made.mel_stft.mel_basis)
    return made.eval()


def _random(model: Any) -> Any:
    """Weights that the constructor leaves at zero or one matter too."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    return model.eval()


def _louder(model: Any) -> Any:
    """Without biases, which are most of what the constructor's small weights let through."""
    for parameter in model.parameters():
        parameter.data *= 2 if parameter.ndim > 1 else 0
    return model.eval()


def _set_statistics(vae: Any) -> None:
    def spread(start: float, end: float) -> Tensor:
        return torch.linspace(start, end, len(vae.latents_mean))

    vae.latents_mean.copy_(spread(-0.5, 0.5))
    vae.latents_std.copy_(spread(0.5, 2.0))
