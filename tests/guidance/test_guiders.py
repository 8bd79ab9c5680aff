"""Our scales against the guiders of diffusers that have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.guiders import LTX2Guidance, SkipLayerGuidance
from torch import Tensor

from stg_trt.guidance.combine import combine
from stg_trt.guidance.options import GuidanceOptions
from stg_trt.guidance.resolved import OFF
from stg_trt.guidance.tables import Guidance
from stg_trt.models.passes import COND

SCALES = [(3.0, 1.0), (3.0, 0.0), (1.0, 1.5), (7.0, 4.0)]


def predictions() -> dict[str, Tensor]:
    """Of two videos, by the pass's name."""
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(2, 4, 3, 6, generator=generator) for name in ("uncond", "cond", "skip")}


def ours(preds: dict[str, Tensor], cfg: float, stg: float, rescale: float) -> Tensor:
    """As a step sums the passes that it runs."""
    options = GuidanceOptions(guidance_scale=cfg, stg_scale=stg, stg_blocks=[1], rescale=rescale)
    guidance = Guidance.for_steps([1.0], options.resolve(OFF))
    passes = guidance.passes(0)
    return combine(
        torch.stack([preds[one.name] for one in passes]),
        torch.tensor(guidance.weights(0)),
        passes.index(COND),
        rescale=guidance.rescale[0],
    )


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize(("cfg", "stg"), SCALES)
def test_scales_of_ltx2(cfg: float, stg: float, rescale: float) -> None:
    preds = predictions()
    guider = LTX2Guidance(guidance_scale=cfg, stg_scale=stg, guidance_rescale=rescale)
    wanted = guider.forward(preds["cond"], preds["uncond"], preds["skip"]).pred
    torch.testing.assert_close(ours(preds, cfg, stg, rescale), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize(("cfg", "stg"), [scales for scales in SCALES if scales[1]])
def test_scales_of_skip_layer_guidance(cfg: float, stg: float, rescale: float) -> None:
    """Without CFG those of its original formulation, which starts from cond; the other one from skip."""
    options: dict[str, Any] = {"guidance_scale": cfg, "guidance_rescale": rescale}
    if cfg == 1:
        # Counted from cond, no CFG is 0.
        options |= {"use_original_formulation": True, "guidance_scale": 0.0}
    guider = SkipLayerGuidance(
        **options,
        skip_layer_guidance_scale=stg,
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
        skip_layer_guidance_layers=[1],
    )
    # Its first step is never guided.
    guider.set_state(step=1, num_inference_steps=3, timestep=torch.tensor(500))
    preds = predictions()
    wanted = guider.forward(preds["cond"], preds["uncond"], preds["skip"]).pred
    torch.testing.assert_close(ours(preds, cfg, stg, rescale), wanted, rtol=1e-5, atol=1e-5)


def test_without_cfg_skip_layer_guidance_starts_from_skip() -> None:
    preds = predictions()
    guided = ours(preds, 1.0, 1.5, 0.0)
    torch.testing.assert_close(guided, preds["skip"] + 2.5 * (preds["cond"] - preds["skip"]))
