"""The guidance options of a call, and how a preset and defaults fill in the rest."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from numbers import Real
from typing import Literal, TypeVar

from stg_trt.errors import InvalidRequest
from stg_trt.guidance.bins import Scale, SkipBlocks, SkipScales
from stg_trt.guidance.presets import Preset, check_preset, load_preset
from stg_trt.guidance.resolved import ResolvedGuidance
from stg_trt.models.perturbation import check_mode

T = TypeVar("T")
AsVideo = Literal["video"]
# Options of a model's sound -> the options of its video.
SCALES_OF_SOUND = {
    "audio_guidance_scale": "guidance_scale",
    "audio_stg_scale": "stg_scale",
    "audio_modality_scale": "modality_scale",
    "audio_rescale": "rescale",
}


@dataclass(frozen=True)
class GuidanceOptions:
    """The guidance of a call, under the names of VideoPipeline's arguments; None leaves an option open.

    A scale is a number, a list with one entry per step, or TimestepBins; blocks likewise. Several skip passes
    have a mapping of these, from their names. `stg_range` is [start, stop) in steps. `preset` names published
    tables. Raises InvalidRequest for a mode or a preset that does not exist; values are checked when the
    steps are known. For a model that takes a guidance as an input, `guidance_scale` is that one and
    `true_cfg_scale` CFG, as in their diffusers pipelines. A model whose CFG rises over the frames takes
    `min_guidance_scale` and `max_guidance_scale` instead. Where two experts take turns, `guidance_scale_2` is
    that of the second one's steps, by default `guidance_scale`. A model with sound takes `modality_scale`,
    which pulls away from streams that do not see each other, and the scales of its sound: `video` is that of
    the video.
    """

    guidance_scale: Scale | None = None
    stg_scale: SkipScales | None = None
    rescale: Scale | None = None
    stg_mode: str | None = None
    stg_blocks: SkipBlocks | None = None
    stg_range: tuple[int, int] | None = None
    preset: str | None = None
    cfg_zero_star: bool | None = None
    use_dynamic_cfg: bool = False
    true_cfg_scale: Scale | None = None
    min_guidance_scale: float | None = None
    max_guidance_scale: float | None = None
    guidance_scale_2: Scale | None = None
    modality_scale: Scale | None = None
    audio_guidance_scale: Scale | AsVideo | None = None
    audio_stg_scale: SkipScales | AsVideo | None = None
    audio_modality_scale: Scale | AsVideo | None = None
    audio_rescale: Scale | AsVideo | None = None

    def __post_init__(self) -> None:
        if self.stg_mode is not None:
            check_mode(self.stg_mode)
        if self.preset is not None:
            check_preset(self.preset)

    @cached_property
    def published(self) -> Preset | None:
        """The preset's tables and steps, read once."""
        return None if self.preset is None else load_preset(self.preset)

    def resolve(self, fallback: ResolvedGuidance, takes_true_cfg: bool = False) -> ResolvedGuidance:
        """Decides what was left open: the call's own options win, then the preset's, then the fallback's.

        With `takes_true_cfg`, `guidance_scale` is an input of the model, and CFG is `true_cfg_scale`. Raises
        InvalidRequest for a scale that does not belong to the model, or that it takes on all steps alike.
        """
        lower = fallback if self.published is None else self.published.guidance
        lowest = fallback.min_guidance_scale
        self._check_frame_scales(rises=lowest is not None)
        cfg_scale = self.max_guidance_scale if lowest is not None else self._cfg_scale(takes_true_cfg)
        video = ResolvedGuidance(
            guidance_scale=_first(cfg_scale, lower.guidance_scale),
            stg_scale=_first(self.stg_scale, lower.stg_scale),
            rescale=_first(self.rescale, lower.rescale),
            stg_mode=_first(self.stg_mode, lower.stg_mode),
            stg_blocks=_first(self.stg_blocks, lower.stg_blocks),
            stg_range=self.stg_range,
            cfg_zero_star=_first(self.cfg_zero_star, lower.cfg_zero_star),
            use_dynamic_cfg=self.use_dynamic_cfg,
            embedded_guidance=self._embedded_guidance() if takes_true_cfg else None,
            min_guidance_scale=_first(self.min_guidance_scale, lowest),
            guidance_scale_2=self.guidance_scale_2,
            modality_scale=_first(self.modality_scale, fallback.modality_scale),
        )
        return replace(video, sound=self._sound(video, fallback.sound))

    def _sound(self, video: ResolvedGuidance, usual: ResolvedGuidance | None) -> ResolvedGuidance | None:
        """The guidance of the sound: the video's with scales of its own."""
        if usual is None:
            for name in ("modality_scale", *SCALES_OF_SOUND):
                if getattr(self, name) is not None:
                    raise InvalidRequest(
                        f"{name}: expected none for a model without sound, got {getattr(self, name)}: leave "
                        "it out"
                    )
            return None
        given = {own: getattr(self, name) for name, own in SCALES_OF_SOUND.items()}
        scales = {
            own: getattr(video, own) if value == "video" else _first(value, getattr(usual, own))
            for own, value in given.items()
        }
        return replace(video, guidance_scale_2=None, **scales)

    def _check_frame_scales(self, *, rises: bool) -> None:
        """Raises InvalidRequest for CFG scales that the model does not have, and for more than a number."""
        of_frames = {name: getattr(self, name) for name in ("min_guidance_scale", "max_guidance_scale")}
        of_steps = {name: getattr(self, name) for name in ("guidance_scale", "true_cfg_scale")}
        instead = "min_guidance_scale and max_guidance_scale" if rises else "guidance_scale"
        for name, value in (of_steps if rises else of_frames).items():
            if value is not None:
                over = "rises over the frames" if rises else "is the same in all frames"
                raise InvalidRequest(
                    f"{name}: expected {instead} for this model, whose CFG {over}, got {value}: give "
                    f"{instead}"
                )
        for name, value in of_frames.items():
            if value is not None and not isinstance(value, Real):
                raise InvalidRequest(f"{name}: expected one number for all steps, got {value}: give one")
        if rises and self.use_dynamic_cfg:
            raise InvalidRequest(
                "use_dynamic_cfg: expected it off for a model whose CFG rises over the frames, got True: "
                "leave it out"
            )

    def _cfg_scale(self, takes_true_cfg: bool) -> Scale | None:
        if takes_true_cfg:
            return self.true_cfg_scale
        if self.true_cfg_scale is not None:
            raise InvalidRequest(
                f"true_cfg_scale: expected it for models that take guidance_scale as an input, got "
                f"{self.true_cfg_scale}: use guidance_scale"
            )
        return self.guidance_scale

    def _embedded_guidance(self) -> float | None:
        scale = self.guidance_scale
        if scale is not None and not isinstance(scale, Real):
            raise InvalidRequest(
                f"guidance_scale: expected one number, which this model takes as an input on all steps, got "
                f"{scale}: give one number, or true_cfg_scale for CFG"
            )
        return None if scale is None else float(scale)


def choose_options(guidance: GuidanceOptions | None, arguments: GuidanceOptions) -> GuidanceOptions:
    """The options of a call that takes them whole or one by one; raises InvalidRequest if it got both."""
    if guidance is None:
        return arguments
    if not isinstance(guidance, GuidanceOptions):
        raise InvalidRequest(
            f"guidance: expected GuidanceOptions, got {type(guidance).__name__}: write "
            "guidance=GuidanceOptions(stg_scale=1.0)"
        )
    given = [f.name for f in fields(arguments) if getattr(arguments, f.name) is not f.default]
    if given:
        raise InvalidRequest(
            f"guidance: expected all guidance options inside it, got {', '.join(given)} beside it: move them "
            "into GuidanceOptions"
        )
    return guidance


def _first(given: T | None, lower: T) -> T:
    return lower if given is None else given
