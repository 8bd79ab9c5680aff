"""Every golden case through ONNX Runtime engines in both layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stg_trt import VideoPipeline

CASES = ("cfg", "stg_r", "stg_a_rescale", "stg_r_no_cfg")


def arguments(case: str, checkpoint: Path) -> dict[str, Any]:
    """A case's call in VideoPipeline's names."""
    given = json.loads((checkpoint / f"{case}.json").read_text())
    tensors = load_file(checkpoint / f"{case}.safetensors")
    names = (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )
    return {
        **{name: tensors[name] for name in (*names, "latents") if name in tensors},
        **{
            name: given[name]
            for name in ("height", "width", "num_frames", "frame_rate", "num_inference_steps")
        },
        "guidance_scale": given["guidance_scale"],
        "stg_scale": given["stg_scale"],
        "stg_blocks": given["stg_applied_layers_idx"],
        "stg_mode": given.get("stg_mode", "stg-r"),
        "rescale": given.get("rescaling_scale", 0.7) if given.get("do_rescaling") else 0.0,
        "output_type": "latent",
    }


def every_step(pipeline: VideoPipeline, **call: Any) -> list[Tensor]:
    """Latents after each step."""
    steps: list[Tensor] = []

    def keep(pipe: Any, index: int, timestep: float, tensors: dict[str, Tensor]) -> None:
        steps.append(tensors["latents"].clone())

    final = pipeline(**call, callback_on_step_end=keep).frames
    assert torch.equal(final, steps[-1])
    return steps


@pytest.fixture(scope="module", params=["segmented", "twin"])
def pipeline(request: pytest.FixtureRequest, ltx_checkpoint: Path, ltx_engines: Path) -> VideoPipeline:
    return VideoPipeline.from_pretrained(ltx_checkpoint, engines=ltx_engines, layout=request.param)


@pytest.mark.parametrize("case", CASES)
def test_every_step_matches(pipeline: VideoPipeline, ltx_checkpoint: Path, case: str) -> None:
    expected = load_file(ltx_checkpoint / f"{case}.safetensors")
    for i, latents in enumerate(every_step(pipeline, **arguments(case, ltx_checkpoint))):
        assert (latents - expected[f"expected_step_{i:02d}"]).abs().max() <= 1e-4, f"step {i}"


@pytest.mark.parametrize("case", CASES)
def test_two_videos_equal_one_by_one(pipeline: VideoPipeline, ltx_checkpoint: Path, case: str) -> None:
    call = arguments(case, ltx_checkpoint)
    other = {k: v.flip(1) if k == "latents" else v for k, v in call.items()}
    other["prompt_embeds"] = other["prompt_embeds"] * 0.5
    both = {k: torch.cat([v, other[k]]) if isinstance(v, Tensor) else v for k, v in call.items()}
    together = pipeline(**both).frames
    apart = torch.cat([pipeline(**call).frames, pipeline(**other).frames])
    assert not torch.allclose(apart[0], apart[1], atol=1e-2)
    assert (together - apart).abs().max() <= 1e-5


def test_a_call_leaves_nothing_behind(pipeline: VideoPipeline, ltx_checkpoint: Path) -> None:
    plain = pipeline(**arguments("cfg", ltx_checkpoint)).frames
    pipeline(**arguments("stg_a_rescale", ltx_checkpoint))
    pipeline(**arguments("stg_r_no_cfg", ltx_checkpoint))
    assert torch.equal(pipeline(**arguments("cfg", ltx_checkpoint)).frames, plain)


@pytest.mark.parametrize("case", CASES)
def test_layouts_agree(ltx_checkpoint: Path, ltx_engines: Path, case: str) -> None:
    results = [
        VideoPipeline.from_pretrained(ltx_checkpoint, engines=ltx_engines, layout=layout)(
            **arguments(case, ltx_checkpoint)
        ).frames
        for layout in ("segmented", "twin")
    ]
    assert (results[0] - results[1]).abs().max() <= 1e-5
