"""What holds Open-Sora's text encoder and VAE, since diffusers has no pipeline for it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtAlphaPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from stg_trt.errors import InvalidRequest

_SPATIAL_COMPRESSION = 8


class OpenSoraPipeline:
    """T5 with a mask, captions cleaned as PixArt-alpha does, and the frames' processor of diffusers."""

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.vae = vae
        self.video_processor = VideoProcessor(vae_scale_factor=_SPATIAL_COMPRESSION)

    def register_modules(self, **parts: Any) -> None:
        """Adds parts that were loaded later."""
        vars(self).update(parts)

    def cleaned(self, prompt: str) -> str:
        """Lower case without links, markup and the like; raises InvalidRequest without what it takes."""
        if not (is_bs4_available() and is_ftfy_available()):
            raise InvalidRequest(
                "prompt: expected the packages beautifulsoup4 and ftfy, with which Open-Sora cleans its "
                "prompts, got none: pip install 'stg-trt[open-sora]', or pass prompt_embeds"
            )
        # The method reads nothing but the class's list of punctuation.
        cleaner = PixArtAlphaPipeline.__new__(PixArtAlphaPipeline)
        (text,) = PixArtAlphaPipeline._text_preprocessing(cleaner, prompt, clean_caption=True)
        return str(text)

    @torch.no_grad()
    def encode_prompt(self, texts: list[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Embeddings (texts, max_length, width) and their mask."""
        tokens = self.tokenizer(
            texts,
            max_length=max_length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        embeds = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return embeds, tokens.attention_mask.to(embeds)
