"""Ways to guide the sampling: those that the demo shows, and those that the sweep compares."""

from __future__ import annotations

from dataclasses import dataclass

from stg_trt.engines.manifest import Manifest
from stg_trt.models.families import family_for
from stg_trt.models.passes import Pass
from stg_trt.models.perturbation import Mode, Perturbation
from stg_trt.models.plan import plan_step
from stg_trt.models.segment import Segment

BLOCK = 5
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
    def passes(self) -> tuple[Pass, ...]:
        """The passes of a step."""
        uncond: tuple[Pass, ...] = ("uncond",) if self.cfg_scale != 1 else ()
        skip: tuple[Pass, ...] = ("skip",) if self.stg_scale else ()
        return (*uncond, "cond", *skip)


def passes_per_step(setting: Setting, manifest: Manifest) -> float:
    """The FLOPs of a step on segmented engines, divided by those of one whole pass."""
    family = family_for(manifest.transformer_config, manifest.vae_config)
    segments = [record.segment for record in manifest.segments if not record.segment.text]

    def flops(segment: Segment) -> int:
        return family.segment_flops(segment, manifest.workload)

    perturbation = Perturbation(setting.stg_mode, (setting.stg_block,)) if setting.stg_scale else None
    one_pass = plan_step(segments, ("cond",), None).flops(flops)
    return plan_step(segments, setting.passes, perturbation).flops(flops) / one_pass


SHOWN = (Setting(), Setting(stg_scale=1), Setting(cfg_scale=1.5), Setting(cfg_scale=1.5, stg_scale=1))
SWEEP = (
    Setting(),
    Setting(cfg_scale=3),
    *(
        Setting(3, stg_scale, mode, block)
        for mode in ("stg-a", "stg-r")
        for block in SWEEP_BLOCKS
        for stg_scale in (1, 2)
    ),
)
