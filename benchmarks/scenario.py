"""The subject of step, sample and peers: one model with random weights, at one size, on one backend."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stg_trt.build_engines.build import build
from stg_trt.build_engines.display import BuildDisplay
from stg_trt.engines.backends import Target, backend_for, check_target
from stg_trt.engines.manifest import load
from stg_trt.engines.store import Build
from stg_trt.errors import InvalidRequest
from stg_trt.guidance.resolved import ResolvedGuidance
from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.base import ModelFamily
from stg_trt.models.passes import COND, SKIP, UNCOND, Pass, all_blocks, read_skips
from stg_trt.models.perturbation import Perturbation, check_blocks
from stg_trt.models.stream import SOUND, VIDEO
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload
from stg_trt.runtime.device import Device, open_device
from stg_trt.runtime.run_inputs import RunInputs

from .diffusers_models import diffusers_model

SMALL_MODEL = Path(__file__).parent / "models" / "ltx-video-512x12"
_SMALL_BLOCKS = (8,)


@dataclass(frozen=True)
class Scenario:
    """The options that step, sample and peers share; None is the small model, or the family's own.

    `blocks` shortens the model, as `build --blocks` does; `precision` is by default the target's first.
    Without `stg`, steps have no skip pass; the engines are the same.
    """

    checkpoint: str | None
    height: int
    width: int
    num_frames: int
    text_length: int | None
    stg_mode: str
    stg_blocks: tuple[int, ...] | None
    backend: str
    target: str | None = None
    blocks: tuple[int, ...] | None = None
    precision: str | None = None
    stg: bool = True

    def check(self) -> None:
        """Raises InvalidRequest or BackendUnavailable for what cannot be measured, before a build."""
        diffusers_model(self.family)
        backend = backend_for(self.backend)
        check_target(backend, self.target or backend.targets[0].name, self.workload.precision)
        self.family.check(self.workload)
        check_blocks(self.perturbation.blocks, self.family.num_blocks)
        if not self.perturbation.blocks:
            raise InvalidRequest("stg_blocks: expected blocks to perturb, got none: name one")
        self.device()

    @property
    def source(self) -> str:
        """The checkpoint as `build` takes it."""
        return self.checkpoint or str(SMALL_MODEL)

    @cached_property
    def opened(self) -> Checkpoint:
        """The checkpoint with random weights, the same wherever they are drawn."""
        return Checkpoint.open(self.source, random_weights=True).shortened(self.blocks)

    @property
    def family(self) -> ModelFamily:
        """The model family."""
        return self.opened.family

    @property
    def workload(self) -> Workload:
        """The sizes, in the precision that was asked for or the target's first."""
        family, usual = self.family, self.family.defaults
        text = usual.text_length if self.text_length is None else self.text_length
        sound = family.audio_num_frames(self.num_frames, usual.frame_rate)
        sizes = self.height, self.width, self.num_frames
        precision = self.precision or self._target.precisions[0]
        activations = self._target.activations(precision)
        return Workload(*sizes, text, precision, audio_num_frames=sound, activations=activations)

    @property
    def perturbation(self) -> Perturbation:
        """The skip rows' perturbation."""
        published = all_blocks(read_skips(self.family.defaults.stg_blocks))
        default = published if self.checkpoint else _SMALL_BLOCKS
        return Perturbation(self.stg_mode, default if self.stg_blocks is None else self.stg_blocks)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes of a step; some families have no unconditional one."""
        plain = (UNCOND, COND) if self.family.defaults.guidance_scale != 1 else (COND,)
        return (*plain, Pass(SKIP, self.perturbation)) if self.stg else plain

    @property
    def _target(self) -> Target:
        backend = backend_for(self.backend)
        return backend.target(self.target or backend.targets[0].name)

    def device(self) -> Device:
        """A new device of the engines' kind."""
        return open_device(self._target.device)

    def build(self, layout: str, root: Path) -> Build:
        """Builds below `root` or re-uses; not verified there, since the whole model is verified here."""
        with BuildDisplay() as display:
            (folder,) = build(
                self.source,
                root,
                height=self.height,
                width=self.width,
                num_frames=self.num_frames,
                text_length=self.workload.text_length,
                stg_blocks=self.perturbation.blocks,
                stg_mode=self.stg_mode,
                layout=layout,
                backend=self.backend,
                target=self.target,
                precision=self.workload.precision,
                random_weights=True,
                blocks=self.blocks,
                verify_timesteps=0,
                progress=display,
            )
        return Build(folder, load(folder))

    def inputs(self, steps: int | None = None) -> Inputs:
        """A request's inputs at random, for `steps` steps of the family's schedule (default: its own)."""
        family, workload = self.family, self.workload
        generator = torch.Generator().manual_seed(0)
        uncond, cond = (family.random_text(workload, 1, generator) for _ in range(2))
        scheduler = self.opened.scheduler()
        family.set_timesteps(scheduler, steps or family.defaults.num_inference_steps, workload)
        solver = SolverTable.from_scheduler(scheduler, per_token=family.steps_per_token(scheduler))
        specs = family.tensors(workload)
        noise = torch.randn(specs["latents"].with_rows(1), generator=generator)
        sound = specs.get(SOUND.latents)
        middle = len(solver.timesteps) // 2
        return Inputs(
            noise=noise * solver.noise_scale,
            uncond=uncond,
            cond=cond,
            solver=solver,
            frame_rate=family.defaults.frame_rate,
            earlier=torch.randn(middle, *noise.shape, generator=generator),
            audio_noise=None if sound is None else torch.randn(sound.with_rows(1), generator=generator),
        )

    def guidance(self, solver: SolverTable, *, stg: bool | None = None) -> Guidance:
        """The family's scales on every step, with or without the skip pass; by default the scenario's.

        An isolation pass, which few families have, is left out.
        """
        stg = self.stg if stg is None else stg
        skips = {SKIP: self.perturbation.blocks}
        usual = ResolvedGuidance.of_family(self.family.defaults, self.stg_mode, skips)
        space = self.family.rescale_space
        given = (usual if stg else usual.without_stg).without_isolation
        return Guidance.for_steps(solver.noise_levels, given, rescale_space=space)

    def to_json(self) -> dict[str, Any]:
        """For a result."""
        return {
            "model": Path(self.source).name,
            "blocks": None if self.blocks is None else list(self.blocks),
            "backend": self.backend,
            "target": self.target or "default",
            "workload": asdict(self.workload),
            "tokens": self.family.tokens(self.workload),
            "stg_mode": self.stg_mode,
            "stg_blocks": list(self.perturbation.blocks),
        }


@dataclass(frozen=True)
class Inputs:
    """One video's request on the CPU: packed noise (1, ...), of its sound too if it has one, texts, steps.

    `earlier` are the predictions (steps, 1, ...) before the middle step, for solvers that read them.
    """

    noise: Tensor
    uncond: TextCondition
    cond: TextCondition
    solver: SolverTable
    frame_rate: float
    earlier: Tensor
    audio_noise: Tensor | None = None

    @property
    def starts(self) -> list[Tensor]:
        """What the streams start from."""
        return [self.noise] if self.audio_noise is None else [self.noise, self.audio_noise]

    def run(self, guidance: Guidance) -> RunInputs:
        """The request under a guidance."""
        streams = (VIDEO, SOUND)[: len(self.starts)]
        starts = {one.latents: start for one, start in zip(streams, self.starts, strict=True)}
        return RunInputs(
            starts, self.cond, self.uncond, guidance, self.solver, self.frame_rate, self.generator()
        )

    def generator(self) -> torch.Generator:
        """Of the noise that the solver adds; the same for whoever samples."""
        return torch.Generator().manual_seed(1)

    @property
    def middle(self) -> int:
        """The step that single steps are measured at."""
        return len(self.earlier)
