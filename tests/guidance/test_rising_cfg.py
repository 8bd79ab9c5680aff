"""CFG that rises over the frames of a video."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stg_trt.errors import InvalidRequest
from stg_trt.guidance.resolved import ResolvedGuidance
from stg_trt.guidance.tables import Guidance


def rising(low: float, high: float, frames: int = 5, **others: Any) -> Guidance:
    """CFG that rises over the frames of a video, on three steps."""
    given = ResolvedGuidance(guidance_scale=high, min_guidance_scale=low, **others)
    return Guidance.for_steps([1.0, 0.5, 0.2], given, frames=frames)


def test_cfg_rises_over_the_frames() -> None:
    guidance = rising(
        1.0, 3.0, stg_scale={"spatial": 1.0, "temporal": 0.5}, stg_blocks={"spatial": 0, "temporal": 1}
    )
    expected = torch.linspace(1.0, 3.0, 5)
    assert guidance.frames == 5
    for frame, cfg in enumerate(expected.tolist()):
        assert guidance.weights(1, frame) == pytest.approx((1 - cfg, cfg + 1.5, -1.0, -0.5))


def test_cfg_over_the_frames_is_off_where_its_largest_is() -> None:
    guidance = rising(0.5, 1.0)
    assert guidance.frames == 1 and not guidance.needs_uncond
    assert rising(0.5, 1.5).cfg_frames == pytest.approx(tuple(torch.linspace(0.5, 1.5, 5).tolist()))


def test_one_frame_has_the_least_scale_as_in_diffusers() -> None:
    assert rising(2.0, 3.0, frames=1).cfg_frames == tuple(torch.linspace(2.0, 3.0, 1).tolist())


def test_the_least_scale_over_the_frames_is_finite() -> None:
    with pytest.raises(InvalidRequest, match="min_guidance_scale: expected a number that is finite, got nan"):
        rising(float("nan"), 3.0)
