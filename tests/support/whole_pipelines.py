"""Calls that VideoPipeline and diffusers' own pipelines both take, on whole tiny checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from stg_trt import VideoPipeline
from tests.support.family_cases import FamilyCase

# That of the goldens, whose graphs the engines share.
TEXT_LENGTH = 9
# The second is cleaned before it is tokenised if diffusers' pipeline does so.
PROMPTS = ["a red circle moving left", "  a &amp;amp;\n blue "]
NEGATIVE = "blurred"
STEPS = 4


@torch.no_grad()
def of_diffusers(
    case: FamilyCase,
    checkpoint: Path,
    scheduler: Any,
    output_type: str,
    tiles: Mapping[str, int] | None = None,
    **given: Any,
) -> Any:
    own = loaded(case, checkpoint) if tiles is None else loaded.__wrapped__(case, checkpoint)
    own.register_modules(scheduler=scheduler)
    if tiles is not None:
        own.vae.enable_tiling()
        shrink_tiles(own.vae, tiles)
    return own(**given, max_sequence_length=TEXT_LENGTH, output_type=output_type).frames


@cache
def loaded(case: FamilyCase, checkpoint: Path) -> Any:
    """diffusers' pipeline of a checkpoint."""
    own = case.pipeline_class.from_pretrained(checkpoint)
    own.set_progress_bar_config(disable=True)
    return own


def shrink_tiles(vae: Any, tiles: Mapping[str, int]) -> None:
    for name, pixels in tiles.items():
        assert hasattr(vae, name)
        setattr(vae, name, pixels)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cfg_of(case: FamilyCase, scale: float) -> dict[str, float]:
    """CFG of a family; where the model takes a guidance as an input, that has a value of its own."""
    if case.family.takes_true_cfg:
        return {"guidance_scale": 5.0, "true_cfg_scale": scale}
    return {"guidance_scale": scale}


def call(case: FamilyCase, pipeline: VideoPipeline, prompts: list[str]) -> dict[str, Any]:
    """Arguments that both take."""
    spec = pipeline.family.tensors(case.workload)["latents"]
    noise = torch.randn(spec.with_rows(len(prompts)), generator=torch.Generator().manual_seed(3))
    return {
        "prompt": prompts,
        "negative_prompt": [NEGATIVE] * len(prompts),
        "height": case.workload.height,
        "width": case.workload.width,
        "num_frames": case.workload.num_frames,
        "num_inference_steps": STEPS,
        **cfg_of(case, 4.0),
        "latents": noise,
    }
