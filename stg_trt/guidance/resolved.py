"""Guidance with every option decided; still one value for all steps, one per step, or bins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stg_trt.guidance.bins import Scale, SkipBlocks, SkipScales

if TYPE_CHECKING:
    from stg_trt.models.defaults import Defaults
    from stg_trt.models.passes import SkipBlocksByName


@dataclass(frozen=True)
class ResolvedGuidance:
    """The result of `GuidanceOptions.resolve`; the defaults turn guidance off.

    STG is off outside the steps [start, stop) of `stg_range`. `embedded_guidance` is None for the default of
    the family, `guidance_scale_2` for `guidance_scale`. With a `min_guidance_scale`, CFG rises from it in the
    first frame to `guidance_scale`, one number, in the last. `modality_scale` is that of the isolation pass,
    off at 1. `sound` is the guidance of the sound of a model that has some.
    """

    guidance_scale: Scale = 1.0
    stg_scale: SkipScales = 0.0
    rescale: Scale = 0.0
    stg_mode: str = "stg-a"
    stg_blocks: SkipBlocks = ()
    stg_range: tuple[int, int] | None = None
    cfg_zero_star: bool = False
    use_dynamic_cfg: bool = False
    embedded_guidance: float | None = None
    min_guidance_scale: float | None = None
    guidance_scale_2: Scale | None = None
    modality_scale: Scale = 1.0
    sound: ResolvedGuidance | None = None

    @classmethod
    def of_family(cls, defaults: Defaults, mode: str, skips: SkipBlocksByName) -> ResolvedGuidance:
        """A family's scales, on engines that were built for these skip passes; without one, STG is off."""
        sound = defaults.sound
        return cls(
            guidance_scale=defaults.guidance_scale,
            stg_scale=defaults.stg_scale if skips else 0.0,
            rescale=defaults.rescale,
            stg_mode=mode,
            stg_blocks=skips or (),
            min_guidance_scale=defaults.min_guidance_scale,
            modality_scale=defaults.modality_scale,
            sound=None if sound is None else cls.of_family(sound, mode, skips),
        )

    @property
    def without_stg(self) -> ResolvedGuidance:
        """The same without skip passes."""
        sound = None if self.sound is None else self.sound.without_stg
        return replace(self, stg_scale=0.0, sound=sound)

    @property
    def without_isolation(self) -> ResolvedGuidance:
        """The same without the isolation pass."""
        sound = None if self.sound is None else self.sound.without_isolation
        return replace(self, modality_scale=1.0, sound=sound)


OFF = ResolvedGuidance()
"""No guidance: one pass per step."""
