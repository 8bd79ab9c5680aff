"""Spatiotemporal Skip Guidance (arXiv 2411.18664): per-step tables, and the arithmetic of one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

from stg_trt.errors import InvalidRequest
from stg_trt.guidance.bins import Scale
from stg_trt.guidance.per_step import check_length, check_values, per_step
from stg_trt.guidance.resolved import OFF, ResolvedGuidance
from stg_trt.guidance.skips import SkipSchedule
from stg_trt.models.passes import COND, ISOLATION, UNCOND, Pass, in_order
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.stream import RescaleSpace


def dynamic_cfg(scale: float, timesteps: Sequence[float]) -> list[float]:
    """1 + scale*(1 - cos(pi*((N - t)/N)^5))/2 for the timesteps t of N steps, as in CogVideoXPipeline.

    Its t counts training steps and its N those that are taken, so that the scale swings between 1 and
    1 + `scale` while t is above N.
    """
    steps = len(timesteps)
    parts = [((steps - timestep) / steps) ** 5 for timestep in timesteps]
    return [1 + scale * (1 - math.cos(math.pi * part)) / 2 for part in parts]


@dataclass(frozen=True)
class Guidance:
    """CFG scale, rescale and skip passes of every step; off is cfg 1, rescale 0, no skip passes.

    A model that denoises several streams has a Guidance for each, named `stream`, with that of the `others`:
    a step computes a pass if any stream wants it. `isolation` are the scales of the isolation pass, one per
    step; none if it is never on.
    `embedded` is the guidance input of a distilled model on all steps; None is its family's default.
    `cfg_frames` are the CFG scales of a video's frames, on every step with CFG; none if `cfg_scale` is that
    of all. `experts` are the numbers of the transformers that predict, one per step; none if there is one.
    """

    cfg_scale: tuple[float, ...]
    rescale: tuple[float, ...]
    skips: tuple[SkipSchedule, ...] = ()
    cfg_zero_star: bool = False
    embedded: float | None = None
    cfg_frames: tuple[float, ...] = ()
    experts: tuple[int, ...] = ()
    isolation: tuple[float, ...] = ()
    rescale_space: RescaleSpace = "prediction"
    stream: str = ""
    others: tuple[Guidance, ...] = ()

    def __post_init__(self) -> None:
        check_length("rescale", len(self.rescale), self.num_steps)
        for skip in self.skips:
            check_length("stg_scale", len(skip.scale), self.num_steps)
        check_values("guidance_scale", self.cfg_scale, -math.inf, math.inf)
        check_values("rescale", self.rescale, 0, 1)
        check_values("modality_scale", self.isolation, -math.inf, math.inf)
        check_values("min_guidance_scale", self.cfg_frames[:1], -math.inf, math.inf)
        if self.embedded is not None and not math.isfinite(self.embedded):
            raise InvalidRequest(
                f"guidance_scale: expected a number that is finite, got {self.embedded}: correct the value"
            )

    @classmethod
    def for_steps(
        cls,
        sigmas: Sequence[float],
        given: ResolvedGuidance = OFF,
        timesteps: Sequence[float] = (),
        frames: int = 1,
        experts: Sequence[int] = (),
        rescale_space: RescaleSpace = "prediction",
    ) -> Guidance:
        """Tables for the steps at `sigmas` (in 0..1 if bins read them).

        `timesteps` are the scheduler's, for `use_dynamic_cfg` alone; `frames` those of a video, for a CFG
        scale that rises over them. Raises InvalidRequest for lists of the wrong length, values out of range,
        and STG without blocks.
        """
        if given.sound is not None:
            rest = (timesteps, frames, experts, rescale_space)
            video = cls.for_steps(sigmas, replace(given, sound=None), *rest)
            sound = replace(cls.for_steps(sigmas, given.sound, *rest), stream="audio")
            return replace(video, stream="video", others=(sound,))
        cfg = _swinging(given.guidance_scale, timesteps) if given.use_dynamic_cfg else given.guidance_scale
        # As diffusers' pipelines decide it: at 1 and below, there is no CFG.
        cfg_scale = tuple(max(scale, 1.0) for scale in per_step("guidance_scale", cfg, sigmas))
        return cls(
            cfg_scale=_of_experts(cfg_scale, given.guidance_scale_2, experts, sigmas),
            rescale=per_step("rescale", given.rescale, sigmas),
            skips=SkipSchedule.for_steps(sigmas, given),
            cfg_zero_star=given.cfg_zero_star,
            embedded=given.embedded_guidance,
            cfg_frames=_rising(given, frames),
            experts=tuple(experts),
            isolation=_isolation(given.modality_scale, sigmas),
            rescale_space=rescale_space,
        )

    @property
    def frames(self) -> int:
        """How many weights a pass has in a step: one, or one per frame of a video."""
        return max(1, len(self.cfg_frames))

    @property
    def num_steps(self) -> int:
        """Steps that the tables are for."""
        return len(self.cfg_scale)

    def expert(self, step: int) -> int:
        """The number of the transformer that predicts at the step."""
        return self.experts[step] if self.experts else 0

    @property
    def needs_uncond(self) -> bool:
        """Whether any step computes the unconditional pass."""
        return any(UNCOND in self.passes(step) for step in range(self.num_steps))

    @property
    def isolates(self) -> bool:
        """Whether any step computes the isolation pass."""
        return any(ISOLATION in self.passes(step) for step in range(self.num_steps))

    @property
    def perturbations(self) -> frozenset[Perturbation]:
        """All that the steps perturb."""
        every = (one.perturbation for step in range(self.num_steps) for one in self.passes(step))
        return frozenset(filter(None, every))

    @property
    def most_skips(self) -> int:
        """The most skip passes that a step computes."""
        return max(sum(one.is_skip for one in self.passes(step)) for step in range(self.num_steps))

    @property
    def streams(self) -> tuple[Guidance, ...]:
        """The guidance of every stream, this one first; each knows the others."""
        alone = [replace(one, others=()) for one in (self, *self.others)]
        return tuple(replace(one, others=(*alone[:i], *alone[i + 1 :])) for i, one in enumerate(alone))

    def passes(self, step: int) -> tuple[Pass, ...]:
        """The passes that the step computes, in the order of their rows."""
        every = (self, *self.others)
        plain = {COND}
        if any(one.cfg_scale[step] != 1 for one in every):
            plain.add(UNCOND)
        if any(one._isolation_scale(step) != 1 for one in every):
            plain.add(ISOLATION)
        return in_order((*plain, *self._skip_passes(step)))

    def _skip_passes(self, step: int) -> tuple[Pass, ...]:
        """A skip pass perturbs the streams that it guides, and no others."""
        wanted: dict[Pass, list[str]] = {}
        for one in (self, *self.others):
            for skip in one.skips:
                if skip.is_on(step):
                    wanted.setdefault(skip.at(step), []).append(one.stream)
        every = 1 + len(self.others)
        return tuple(
            skip if len(streams) == every else skip.of_stream(streams[0]) for skip, streams in wanted.items()
        )

    def _isolation_scale(self, step: int) -> float:
        return self.isolation[step] if self.isolation else 1.0

    def weights(self, step: int, frame: int = 0) -> tuple[float, ...]:
        """The weights of the step's passes in the sum of a frame, which add up to 1."""
        cfg = self.cfg_scale[step]
        if cfg != 1 and self.cfg_frames:
            cfg = self.cfg_frames[frame]
        isolation = self._isolation_scale(step) - 1
        skips = {skip.name: skip.scale[step] for skip in self.skips if skip.is_on(step)}
        plain = {UNCOND: 1 - cfg, ISOLATION: -isolation, COND: cfg + sum(skips.values()) + isolation}
        return tuple(-skips.get(one.name, 0.0) if one.is_skip else plain[one] for one in self.passes(step))


def _of_experts(
    first: tuple[float, ...], second: Scale | None, experts: Sequence[int], sigmas: Sequence[float]
) -> tuple[float, ...]:
    """The scales of the steps, of which those of the second expert have their own if there is CFG at all.

    As diffusers' pipelines have it: guidance_scale alone decides that, and a second scale below 1 is on the
    way from the negative prompt's prediction to the prompt's.
    """
    if second is None:
        return first
    seconds = per_step("guidance_scale_2", second, sigmas)
    check_values("guidance_scale_2", seconds, -math.inf, math.inf)
    if all(scale == 1 for scale in first):
        return first
    triples = zip(first, seconds, experts, strict=True)
    return tuple(own if expert else scale for scale, own, expert in triples)


def _isolation(scale: Scale, sigmas: Sequence[float]) -> tuple[float, ...]:
    """As diffusers decides it: at 1 and below, there is no isolation pass."""
    scales = tuple(max(one, 1.0) for one in per_step("modality_scale", scale, sigmas))
    return scales if any(one != 1 for one in scales) else ()


def _swinging(scale: Scale, timesteps: Sequence[float]) -> list[float]:
    """The scales of use_dynamic_cfg; at 1 and below there is no guidance that could change."""
    if not isinstance(scale, int | float | Real) or float(scale) <= 1:
        raise InvalidRequest(
            f"use_dynamic_cfg: expected guidance_scale as one number above 1, got {scale}: give one, or turn "
            "use_dynamic_cfg off"
        )
    return dynamic_cfg(float(scale), timesteps)


def _rising(given: ResolvedGuidance, frames: int) -> tuple[float, ...]:
    """From the least scale in the first frame to the largest in the last, in even steps, as in diffusers."""
    if given.min_guidance_scale is None:
        return ()
    low, high = given.min_guidance_scale, given.guidance_scale
    assert isinstance(high, int | float | Real)
    rise = (float(high) - low) / max(1, frames - 1)
    return tuple(low + rise * frame for frame in range(frames)) if high > 1 else ()
