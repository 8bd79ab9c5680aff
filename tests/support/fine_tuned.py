"""Checkpoints with the configuration of another one and with other weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def save_fine_tuned(checkpoint: Path, folder: Path, strength: float = 0.05) -> Path:
    """Every weight of the transformers is changed a little, each by another share."""
    shutil.copytree(checkpoint, folder)
    generator = torch.Generator().manual_seed(1)
    for part in ("transformer", "transformer_2", "unet"):
        for path in sorted((folder / part).glob("*.safetensors")):
            changed = {}
            for name, weight in load_file(path).items():
                shares = 1 + strength * torch.randn(weight.shape, generator=generator)
                changed[name] = weight * shares.to(weight.dtype)
            save_file(changed, path, {"format": "pt"})
    return folder
