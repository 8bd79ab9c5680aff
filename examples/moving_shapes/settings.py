"""Ways to guide the sampling: those that the demo shows, and those that the sweep compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from stg_trt import GuidanceOptions, VideoPipeline
from stg_trt.engines.manifest import Manifest
from stg_trt.guidance.resolved import OFF
from stg_trt.guidance.tables import Guidance
from stg_trt.models.passes import COND, Pass
from stg_trt.models.perturbation import Mode
from stg_trt.models.plan import plan_step
from stg_trt.models.segment import Segment
from stg_trt.runtime.callbacks import StepCallback

from .clips import FRAME_RATE, NUM_FRAMES, SIZE, Array

BLOCK = 2
SWEEP_BLOCKS = (2, 5)
"""All blocks of the sweep; BLOCK is one of them."""


@dataclass(frozen=True)
class Setting:
    """CFG and STG scales with one perturbed block; 1 and 0 are off."""

    cfg_scale: float = 1.0
    stg_scale: float = 0.0
    stg_mode: Mode = "stg-a"
    stg_block: int = BLOCK

    @property
    def name(self) -> str:
        """The name in tables and pictures."""
        cfg = f"CFG {self.cfg_scale:g}" if self.cfg_scale != 1 else ""
        stg = f"{self.stg_mode.upper()} {self.stg_scale:g}, block {self.stg_block}" if self.stg_scale else ""
        return " + ".join(filter(None, (cfg, stg))) or "no guidance"

    @property
    def guidance(self) -> GuidanceOptions:
        """The options of a call; nothing is rescaled."""
        return GuidanceOptions(
            guidance_scale=self.cfg_scale,
            stg_scale=self.stg_scale,
            rescale=0.0,
            stg_mode=self.stg_mode,
            stg_blocks=[self.stg_block],
        )

    @property
    def tables(self) -> Guidance:
        """Its guidance of one step."""
        return Guidance.for_steps((1.0,), self.guidance.resolve(OFF))

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes of a step."""
        return self.tables.passes(0)


def sample(
    pipeline: VideoPipeline,
    setting: Setting,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    pictures: Sequence[Array] = (),
    callback: StepCallback | None = None,
) -> Any:
    """Clips (prompts, frames, height, width, 3) in 0..1; the noise depends on the seeds alone.

    `pictures` (height, width, 3) in 0..1, one per prompt, are what the clips begin with; without any, the
    clips are made of the prompts alone.
    """
    return pipeline(
        prompt=[*prompts],
        image=[as_image(picture) for picture in pictures] or None,
        height=SIZE,
        width=SIZE,
        num_frames=NUM_FRAMES,
        frame_rate=FRAME_RATE,
        num_inference_steps=steps,
        guidance=setting.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
        callback_on_step_end=callback,
    ).frames


def as_image(picture: Array) -> Image.Image:
    """A picture (height, width, 3) in 0..1 with 8 bits per channel."""
    return Image.fromarray((picture * 255).round().clip(0, 255).astype(np.uint8))


def as_array(image: Image.Image) -> Array:
    """An image as a picture (height, width, 3) in 0..1."""
    return np.asarray(image).astype(np.float32) / np.float32(255)


def passes_per_step(setting: Setting, manifest: Manifest) -> float:
    """The FLOPs of a step on segmented engines, divided by those of one whole pass."""
    family = manifest.model
    segments = [record.segment for record in manifest.segments if not record.segment.text]

    def flops(segment: Segment) -> int:
        return family.segment_flops(segment, manifest.workload)

    one_pass = plan_step(segments, [COND]).flops(flops)
    return plan_step(segments, setting.passes).flops(flops) / one_pass


SHOWN = (Setting(), Setting(stg_scale=0.5), Setting(cfg_scale=1.5), Setting(cfg_scale=1.5, stg_scale=0.5))
SWEEP = (
    Setting(),
    Setting(cfg_scale=3),
    *(
        Setting(3, stg_scale, mode, block)
        for mode in ("stg-a", "stg-r")
        for block in SWEEP_BLOCKS
        for stg_scale in (0.5, 1)
    ),
)
