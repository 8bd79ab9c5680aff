"""Small LoRAs of the tiny checkpoints, as peft trains and diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from stg_trt.models.checkpoint import Checkpoint
from tests.support.family_cases import FamilyCase


def save_lora(
    case: FamilyCase, checkpoint: Path, path: Path, block: int | None, seed: int = 0, notes: bool = True
) -> list[str]:
    """Of all linear layers of one block, or of those in none; returns the names of the layers.

    `notes` are the rank 4 and the alpha 8, without which a reader takes the alpha to be the rank.
    """
    model: Any = Checkpoint.open(checkpoint).load_transformer()
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and case.family.block_of(f"{name}.weight") == block
    ]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False)
        model.add_adapter(config)
    matrices = get_peft_model_state_dict(model)
    case.pipeline_class.save_lora_weights(
        path.parent,
        transformer_lora_layers=matrices,
        weight_name=path.name,
        transformer_lora_adapter_metadata=config.to_dict() if notes else None,
    )
    return layers
