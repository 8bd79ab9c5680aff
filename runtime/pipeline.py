"""Prompt to video with compiled engines, under diffusers' argument names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stg_trt.engines.backends import backend_for
from stg_trt.engines.manifest import Manifest
from stg_trt.engines.store import Build, EngineRequest, EngineStore, find_possible
from stg_trt.errors import InvalidRequest, OutOfDeviceMemory
from stg_trt.guidance.presets import BlockSets, Preset, Scale, load_preset
from stg_trt.guidance.solver import SolverTable
from stg_trt.guidance.tables import Guidance, dynamic_cfg
from stg_trt.models.checkpoint import Checkpoint, published
from stg_trt.models.workload import Workload
from stg_trt.system.gpu import this_machine

from .components import Components
from .device import Device, open_device
from .noise import Generators, draw
from .prompts import Embeddings, Prompts
from .sampler import SampledStep, Sampler

StepCallback = Callable[["VideoPipeline", int, float, dict[str, Tensor]], dict[str, Tensor] | None]
_GIB = 1 << 30
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_LESS_TO_SAMPLE = "fewer frames, a smaller size, fewer videos at once, the segmented layout, or --offload"
_LESS_TO_DECODE = "fewer frames, a smaller size, or --offload"


@dataclass(frozen=True)
class Schedule:
    """What a call runs: a build, and for each step its guidance and the solver's coefficients."""

    build: Build
    guidance: Guidance
    solver: SolverTable

    @property
    def workload(self) -> Workload:
        """The sizes of the build."""
        return self.build.manifest.workload


@dataclass
class VideoPipelineOutput:
    """`frames` as diffusers returns them: lists of PIL images, (videos, frames, height, width, 3) in 0..1,
    (videos, frames, 3, height, width), or packed latents."""

    frames: Any


class VideoPipeline:
    """Text encoder, sampler over engines, and VAE of one checkpoint. It never changes a model."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        store: EngineStore,
        *,
        layout: str | None = None,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        offload: bool = False,
        vae_tiling: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.family = checkpoint.family
        self.components = Components(checkpoint, dtype, offload, vae_tiling)
        self.store = store
        self.scheduler = checkpoint.scheduler()
        self.interrupt = False
        self.num_timesteps = 0
        self._warned = False
        self._base = EngineRequest(
            weights=checkpoint.fingerprint(), layout=layout, backend=backend, machine=this_machine()
        )
        self._samplers: dict[Path, Sampler] = {}
        self._devices: dict[str, Device] = {}

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        engines: str | Path,
        *,
        layout: str | None = None,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        offload: bool = False,
        vae_tiling: bool = False,
    ) -> VideoPipeline:
        """Opens a checkpoint and a folder of engines built from it; raises where they do not fit.

        `dtype` is that of text encoder and VAE (default: bfloat16 on a GPU, else float32); `offload`
        keeps them off the GPU while they are not needed. `vae_tiling` is diffusers' `vae.enable_tiling()`:
        less memory for large frames, blended from overlapping tiles, so not exactly those of decoding them
        whole. Either way, videos are decoded one at a time.
        """
        opened = Checkpoint.open(checkpoint, random_weights=str(checkpoint) in published())
        pipeline = cls(
            opened,
            EngineStore.open(engines),
            layout=layout,
            backend=backend,
            dtype=dtype,
            offload=offload,
            vae_tiling=vae_tiling,
        )
        pipeline.store.find(pipeline._base)
        return pipeline

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        frame_rate: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: Scale | None = None,
        embedded_guidance: float | None = None,
        stg_scale: Scale | None = None,
        stg_mode: str | None = None,
        stg_blocks: BlockSets | None = None,
        stg_range: tuple[int, int] | None = None,
        rescale: Scale | None = None,
        cfg_zero_star: bool | None = None,
        preset: str | None = None,
        use_dynamic_cfg: bool = False,
        num_videos_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        **decode_options: Any,
    ) -> VideoPipelineOutput:
        """Generates videos; what is None comes from the engines (sizes, blocks) or the family's defaults.

        Scales are numbers, lists with one entry per step, or TimestepBins; `preset` names published tables,
        `use_dynamic_cfg` is CogVideoXPipeline's. `generator` draws the first noise, then the solver's;
        `decode_options` are the family's own. Raises InvalidRequest for arguments that cannot be used and
        EngineRejected where no engine fits them.
        """
        self._check_options(output_type, embedded_guidance, decode_options)
        prompts = Prompts(
            prompt,
            negative_prompt,
            Embeddings(prompt_embeds, prompt_attention_mask, pooled_prompt_embeds),
            Embeddings(negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds),
            num_videos_per_prompt,
        )
        scales = {"guidance_scale": guidance_scale, "stg_scale": stg_scale, "rescale": rescale}
        perturbed = {"stg_mode": stg_mode, "stg_blocks": stg_blocks, "stg_range": stg_range}
        switches = {"cfg_zero_star": cfg_zero_star, "preset": preset, "use_dynamic_cfg": use_dynamic_cfg}
        given = {**scales, **perturbed, **switches, "embedded_guidance": embedded_guidance}
        size = {"height": height, "width": width, "num_frames": num_frames, "videos": prompts.videos}
        schedule = self._schedule(size, num_inference_steps, given)
        if output_type != "latent":  # A checkpoint without a VAE is refused before the sampling.
            self.components.load(self._device_for(schedule.build).torch_device)
        noise = self._noise(schedule, prompts.videos, generator, latents)
        with _memory_explained(schedule.build.manifest, "GPU memory", _LESS_TO_SAMPLE):
            steps = self._steps(schedule, prompts, noise, frame_rate, generator)
            result = self._drain(steps, noise, callback_on_step_end)
        return self._output(result, schedule, output_type, generator=generator, **decode_options)

    def _schedule(self, size: dict[str, Any], steps: int | None, given: dict[str, Any]) -> Schedule:
        """The build that fits the request, with its steps and their guidance."""
        first = find_possible(self.store, replace(self._base, **size), self.family).manifest
        preset = load_preset(given["preset"]) if given["preset"] is not None else None
        solver, sigmas = self._solve(first.workload, steps, preset)
        given = self._with_defaults(given, first)
        if given.pop("use_dynamic_cfg"):
            given["guidance_scale"] = _swinging(given["guidance_scale"], solver.timesteps[: len(sigmas)])
        guidance = Guidance.for_steps(sigmas, **given)
        self._warn_of_second_guidance(guidance)
        perturbations = frozenset(filter(None, map(guidance.perturbation, range(len(sigmas)))))
        exact = {name: getattr(first.workload, name) for name in ("height", "width", "num_frames")}
        request = replace(self._base, **size | exact, perturbations=perturbations)
        self.num_timesteps = len(sigmas)
        return Schedule(self.store.find(request), guidance, solver)

    def _steps(
        self,
        schedule: Schedule,
        prompts: Prompts,
        noise: Tensor,
        frame_rate: float | None,
        generator: Generators | None,
    ) -> Iterator[SampledStep]:
        workload, guidance = schedule.workload, schedule.guidance
        device = self._device_for(schedule.build).torch_device
        cond, uncond = prompts.conditions(
            lambda texts: self.components.encode(texts, workload, device),
            self.family.tensors(workload),
            any("uncond" in guidance.passes(i) for i in range(self.num_timesteps)),
            self.family.has_text_mask,
        )
        for text in filter(None, (cond, uncond)):
            self.family.check_text(text)
        rate = self.family.defaults.frame_rate if frame_rate is None else frame_rate
        if not 0 < rate < math.inf:
            raise InvalidRequest(f"frame_rate: expected frames per second above 0, got {rate}: use 25")
        sampler, solver = self._sampler(schedule.build), schedule.solver
        return sampler.steps(noise, cond, uncond, guidance, solver, rate, generator)

    def _output(
        self, latents: Tensor, schedule: Schedule, output_type: str, **decode_options: Any
    ) -> VideoPipelineOutput:
        if output_type == "latent":
            return VideoPipelineOutput(latents)
        device = self._device_for(schedule.build).torch_device
        less = _LESS_TO_DECODE if self.components.vae_tiling else f"--vae-tiling, {_LESS_TO_DECODE}"
        with _memory_explained(schedule.build.manifest, "GPU memory of decoding", less):
            frames = self.components.decode(latents, schedule.workload, device, output_type, **decode_options)
        return VideoPipelineOutput(frames)

    def _drain(self, steps: Iterator[SampledStep], latents: Tensor, callback: StepCallback | None) -> Tensor:
        """Drains the sampler; `interrupt` (settable from the callback) stops after the current step."""
        self.interrupt = False
        step = None
        for step in steps:
            if callback is not None:
                offered = step.latents
                answer = callback(self, step.index, step.timestep, {"latents": offered}) or {}
                if answer.get("latents", offered) is not offered:
                    step.latents = answer["latents"]
            if self.interrupt:
                break
        return latents if step is None else step.latents

    def _device_for(self, build: Build) -> Device:
        """One device for all builds of a kind, so that graphs share memory."""
        name = backend_for(build.manifest.backend).target(build.manifest.target).device
        if name not in self._devices:
            self._devices[name] = open_device(name)
        return self._devices[name]

    def _sampler(self, build: Build) -> Sampler:
        if build.folder not in self._samplers:
            device = self._device_for(build)
            engines = build.load_engines(device)
            self._samplers[build.folder] = Sampler(self.family, build.manifest, engines, device)
        return self._samplers[build.folder]

    def _solve(
        self, workload: Workload, steps: int | None, preset: Preset | None
    ) -> tuple[SolverTable, tuple[float, ...]]:
        """The solver's table, and the noise level of every step that is taken."""
        given = preset.num_inference_steps if preset else self.family.defaults.num_inference_steps
        steps = given if steps is None else steps
        if steps < 1:
            raise InvalidRequest(f"num_inference_steps: expected at least 1, got {steps}: use {given}")
        self.family.set_timesteps(self.scheduler, steps, workload)
        if preset and preset.drop_first:
            self.scheduler.set_begin_index(preset.drop_first)
        solver = SolverTable.from_scheduler(self.scheduler)
        taken = len(solver.timesteps) - (preset.drop_last if preset else 0)
        return solver, solver.noise_levels[:taken]

    def _with_defaults(self, given: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
        """Fills what was not given: from the preset, else the family's scales and the engines' blocks."""
        if given["preset"] is not None:
            return given
        defaults = self.family.defaults
        fallback = {
            "guidance_scale": defaults.guidance_scale,
            "stg_scale": defaults.stg_scale if manifest.stg_blocks else 0.0,
            "rescale": defaults.rescale,
            "stg_mode": manifest.stg_mode,
            "stg_blocks": manifest.stg_blocks,
        }
        return given | {name: value for name, value in fallback.items() if given[name] is None}

    def _warn_of_second_guidance(self, guidance: Guidance) -> None:
        """Once: CFG on top of the guidance that a distilled model takes as an input."""
        scale = next((scale for scale in guidance.cfg_scale if scale != 1), None)
        if scale is None or self.family.embedded_guidance is None or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"guidance_scale: expected 1 for {self.family.name}, which is distilled and takes "
            f"embedded_guidance instead, got {scale}: CFG on top of it doubles the work with one more pass "
            "per step; leave guidance_scale out to save it",
            stacklevel=5,
        )

    def _noise(
        self, schedule: Schedule, videos: int, generator: Generators | None, latents: Tensor | None
    ) -> Tensor:
        """Packed float32 noise at the solver's scale: drawn as diffusers draws it, or given."""
        workload = schedule.workload
        shape = (videos, *self.family.noise_shape(workload))
        packed = self.family.tensors(workload)["latents"].with_rows(videos)
        if isinstance(generator, list) and len(generator) != videos:
            raise InvalidRequest(
                f"generator: expected one or {videos}, got {len(generator)}: give one per video"
            )
        if latents is None:
            latents = draw(shape, generator)
        if tuple(latents.shape) not in (packed, shape):
            raise InvalidRequest(
                f"latents: expected {packed} or {shape} for {workload}, got {tuple(latents.shape)}: "
                "pass latents of the size the engines were built for"
            )
        noise = self.family.pack(latents) if tuple(latents.shape) == shape else latents
        return noise.float() * schedule.solver.noise_scale

    def _check_options(
        self, output_type: str, embedded_guidance: float | None, decode_options: dict[str, Any]
    ) -> None:
        if output_type not in _OUTPUT_TYPES:
            raise InvalidRequest(
                f"output_type: expected one of {', '.join(_OUTPUT_TYPES)}, got {output_type!r}: choose one"
            )
        if embedded_guidance is not None and self.family.embedded_guidance is None:
            raise InvalidRequest(
                f"embedded_guidance: expected none for {self.family.name}, which takes no guidance as an "
                f"input, got {embedded_guidance}: use guidance_scale"
            )
        unknown = decode_options.keys() - self.family.decode_options
        if unknown:
            raise InvalidRequest(
                f"arguments: expected those of VideoPipeline, got {', '.join(sorted(unknown))}: "
                "check the spelling"
            )


def _swinging(scale: Scale | None, timesteps: Sequence[float]) -> list[float]:
    """The scales of use_dynamic_cfg; below 1 there is no guidance that could change."""
    if not isinstance(scale, int | float) or scale <= 1:
        raise InvalidRequest(
            f"use_dynamic_cfg: expected guidance_scale as one number above 1, got {scale}: give one, or turn "
            "use_dynamic_cfg off"
        )
    return dynamic_cfg(scale, timesteps)


@contextmanager
def _memory_explained(manifest: Manifest, place: str, less: str) -> Iterator[None]:
    """Turns the GPU's out-of-memory error into what the build needs, and `less`, what needs less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        weights = sum(file.bytes for record in manifest.segments for file in record.files)
        activations = max(record.activation_bytes or 0 for record in manifest.segments)
        raise OutOfDeviceMemory(
            f"{place}: expected room for engines of {weights / _GIB:.1f} GiB, activations of "
            f"{activations / _GIB:.1f} GiB, the text encoder and the VAE ({manifest.workload}, "
            f"{manifest.layout}), got {str(error).splitlines()[0]} use {less}"
        ) from error
