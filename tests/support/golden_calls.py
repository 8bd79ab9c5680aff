"""The calls of the goldens, in VideoPipeline's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stg_trt import VideoPipeline
from tests.support.family_cases import CASES

GOLDENS = [(case, golden) for case in CASES for golden in case.golden_names]


def arguments(golden: str, checkpoint: Path) -> dict[str, Any]:
    """A golden's call in VideoPipeline's names."""
    given = json.loads((checkpoint / f"{golden}.json").read_text())
    tensors = load_file(checkpoint / f"{golden}.safetensors")
    names = (
        "prompt_embeds",
        "prompt_attention_mask",
        "pooled_prompt_embeds",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    return {
        **{name: tensors[name] for name in (*names, "latents") if name in tensors},
        **{
            name: given[name]
            for name in ("height", "width", "num_frames", "frame_rate", "num_inference_steps")
            if name in given
        },
        "guidance_scale": given["guidance_scale"],
        "true_cfg_scale": given.get("true_cfg_scale"),
        "stg_scale": given["stg_scale"],
        "stg_blocks": given["stg_applied_layers_idx"],
        "stg_mode": given.get("stg_mode", "stg-r"),
        "rescale": given.get("rescaling_scale", 0.7) if given.get("do_rescaling") else 0.0,
        "output_type": "latent",
        **({"generator": seeded(given["generator_seed"])} if "generator_seed" in given else {}),
    }


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def every_step(pipeline: VideoPipeline, **call: Any) -> list[Tensor]:
    """Latents after each step."""
    steps: list[Tensor] = []

    def keep(pipe: Any, index: int, timestep: float, tensors: dict[str, Tensor]) -> None:
        steps.append(tensors["latents"].clone())

    final = pipeline(**call, callback_on_step_end=keep).frames
    assert torch.equal(final, steps[-1])
    return steps


def flipped(call: dict[str, Any]) -> dict[str, Any]:
    """The same call with other noise."""
    return call | {"latents": call["latents"].flip(1)}


def joined(call: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The videos of both, under the options of the first."""
    return {k: torch.cat([v, other[k]]) if isinstance(v, Tensor) else v for k, v in call.items()}
