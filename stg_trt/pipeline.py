"""Prompt to video with compiled engines, under diffusers' argument names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stg_trt.checkpoint import Checkpoint, published
from stg_trt.engine_store import Build, EngineRequest, EngineStore
from stg_trt.errors import InvalidRequest
from stg_trt.families.base import TextCondition, Workload, load_class
from stg_trt.guidance import BlockSets, Guidance, Preset, Scale, load_preset
from stg_trt.sampler import SampledStep, Sampler
from stg_trt.solver import SolverTable

StepCallback = Callable[["VideoPipeline", int, float, dict[str, Tensor]], dict[str, Tensor] | None]
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


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
    ) -> None:
        self.checkpoint = checkpoint
        self.family = checkpoint.family
        self.store = store
        self.scheduler = checkpoint.scheduler()
        self.interrupt = False
        self.num_timesteps = 0
        self._base = EngineRequest(weights=checkpoint.fingerprint(), layout=layout, backend=backend)
        self._samplers: dict[Path, Sampler] = {}

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        engines: str | Path,
        *,
        layout: str | None = None,
        backend: str | None = None,
    ) -> VideoPipeline:
        """Opens a checkpoint and a folder of engines built from it; raises where they do not fit."""
        opened = Checkpoint.open(checkpoint, random_weights=str(checkpoint) in published())
        pipeline = cls(opened, EngineStore.open(engines), layout=layout, backend=backend)
        pipeline.store.find(pipeline._base)
        return pipeline

    @cached_property
    def components(self) -> Any:
        """The checkpoint's diffusers pipeline without its transformer: text encoder, tokenizer, VAE."""
        if not self.checkpoint.has_pipeline:
            raise InvalidRequest(
                f"checkpoint: expected a text encoder and a VAE (model_index.json), got only a transformer in "
                f"{self.checkpoint.name}: pass prompt_embeds and output_type='latent'"
            )
        try:
            return load_class(self.family.pipeline_class).from_pretrained(
                self.checkpoint.folder, transformer=None
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InvalidRequest(
                f"checkpoint: expected a whole {self.family.pipeline_class} folder, got {reason}: "
                "download it again"
            ) from error

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
        stg_scale: Scale | None = None,
        stg_mode: str | None = None,
        stg_blocks: BlockSets | None = None,
        stg_range: tuple[int, int] | None = None,
        rescale: Scale | None = None,
        cfg_zero_star: bool | None = None,
        preset: str | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        **decode_options: Any,
    ) -> VideoPipelineOutput:
        """Generates videos; what is None comes from the engines (sizes, blocks) or the family's defaults.

        Scales are numbers, lists with one entry per step, or TimestepBins; `preset` names published
        tables. `decode_options` are the family's own (such as decode_timestep). Raises InvalidRequest for
        arguments that cannot be used and EngineRejected where no engine fits them.
        """
        _check_output(output_type, decode_options)
        prompts = _prompts(prompt, prompt_embeds)
        videos = (len(prompts) if prompts is not None else len(_given(prompt_embeds))) * num_videos_per_prompt
        base = self._request(height=height, width=width, num_frames=num_frames, videos=videos)
        workload = self.store.find(base).manifest.workload
        published_tables = load_preset(preset) if preset is not None else None
        solver, sigmas = self._solve(workload, num_inference_steps, published_tables)
        guidance = self._guidance(
            sigmas,
            self.store.find(base),
            guidance_scale=guidance_scale,
            stg_scale=stg_scale,
            stg_mode=stg_mode,
            stg_blocks=stg_blocks,
            stg_range=stg_range,
            rescale=rescale,
            cfg_zero_star=cfg_zero_star,
            preset=preset,
        )
        wanted = frozenset(filter(None, map(guidance.perturbation, range(len(sigmas)))))
        build = self.store.find(
            self._request(
                height=workload.height,
                width=workload.width,
                num_frames=workload.num_frames,
                videos=videos,
                perturbations=wanted,
            )
        )
        cond, uncond = self._conditions(
            build.manifest.workload,
            prompts,
            negative_prompt,
            TextCondition(prompt_embeds, prompt_attention_mask) if prompt_embeds is not None else None,
            (negative_prompt_embeds, negative_prompt_attention_mask),
            any("uncond" in guidance.passes(i) for i in range(len(sigmas))),
            num_videos_per_prompt,
        )
        self.num_timesteps = len(sigmas)
        noise = self._noise(workload, videos, generator, latents) * solver.noise_scale
        steps = self._sampler(build).steps(
            noise, cond, uncond, guidance, solver, frame_rate or self.family.defaults.frame_rate
        )
        result = self._run(steps, noise, callback_on_step_end)
        if output_type == "latent":
            return VideoPipelineOutput(result)
        video = self.family.decode(self.components, result, workload, generator=generator, **decode_options)
        return VideoPipelineOutput(
            self.components.video_processor.postprocess_video(video, output_type=output_type)
        )

    def _run(self, steps: Any, latents: Tensor, callback: StepCallback | None) -> Tensor:
        """Drains the sampler; `interrupt` (settable from the callback) stops after the current step."""
        self.interrupt = False
        step: SampledStep
        for step in steps:
            if callback is not None:
                replaced = callback(self, step.index, step.timestep, {"latents": step.latents}) or {}
                step.latents = replaced.get("latents", step.latents)
            latents = step.latents
            if self.interrupt:
                break
        return latents

    def _request(self, **needs: Any) -> EngineRequest:
        base = self._base
        return EngineRequest(weights=base.weights, layout=base.layout, backend=base.backend, **needs)

    def _sampler(self, build: Build) -> Sampler:
        if build.folder not in self._samplers:
            self._samplers[build.folder] = Sampler(self.family, build.manifest, build.load_engines())
        return self._samplers[build.folder]

    def _solve(
        self, workload: Workload, steps: int | None, preset: Preset | None
    ) -> tuple[SolverTable, list[float]]:
        """The solver's table, and the sigma in 0..1 of every step that is taken."""
        given = preset.num_inference_steps if preset else self.family.defaults.num_inference_steps
        steps = given if steps is None else steps
        if steps < 1:
            raise InvalidRequest(f"num_inference_steps: expected at least 1, got {steps}: use {given}")
        self.family.set_timesteps(self.scheduler, steps, workload)
        if preset and preset.drop_first:
            self.scheduler.set_begin_index(preset.drop_first)
        solver = SolverTable.from_scheduler(self.scheduler)
        taken = len(solver.timesteps) - (preset.drop_last if preset else 0)
        training_steps = self.scheduler.config.num_train_timesteps
        return solver, [timestep / training_steps for timestep in solver.timesteps[:taken]]

    def _guidance(self, sigmas: Sequence[float], build: Build, **given: Any) -> Guidance:
        """Fills what was not given: from the preset, else the family's scales and the engines' blocks."""
        if given["preset"] is None:
            defaults = self.family.defaults
            if given["stg_scale"] is None and not build.manifest.stg_blocks:
                given["stg_scale"] = 0.0
            fallback = {
                "guidance_scale": defaults.guidance_scale,
                "stg_scale": defaults.stg_scale,
                "rescale": defaults.rescale,
                "stg_mode": build.manifest.stg_mode,
                "stg_blocks": build.manifest.stg_blocks,
            }
            given |= {name: value for name, value in fallback.items() if given[name] is None}
        return Guidance.for_steps(sigmas, **given)

    def _conditions(
        self,
        workload: Workload,
        prompts: list[str] | None,
        negative_prompt: str | list[str] | None,
        given: TextCondition | None,
        negative: tuple[Tensor | None, Tensor | None],
        needs_uncond: bool,
        per_prompt: int,
    ) -> tuple[TextCondition, TextCondition | None]:
        """Text conditions of the cond rows and, where a step computes them, of the uncond rows."""
        if given is not None:
            cond = _checked(given, "prompt_embeds", workload)
            uncond = None
            if needs_uncond:
                uncond = _checked(TextCondition(*negative), "negative_prompt_embeds", workload)
        else:
            assert prompts is not None
            cond, uncond = self._encode(prompts, workload), None
            if needs_uncond:
                texts = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
                texts = texts * len(prompts) if len(texts) == 1 else texts
                if len(texts) != len(prompts):
                    raise InvalidRequest(
                        f"negative_prompt: expected 1 or {len(prompts)} texts, got {len(texts)}: "
                        "give one per prompt"
                    )
                uncond = self._encode(texts, workload)
        return _repeated(cond, per_prompt), _repeated(uncond, per_prompt) if uncond else None

    def _encode(self, prompts: list[str], workload: Workload) -> TextCondition:
        for prompt in prompts:
            tokens = self.family.text_tokens(self.components, prompt)
            if tokens > workload.text_length:
                raise InvalidRequest(
                    f"prompt: expected at most {workload.text_length} tokens, got {tokens}: "
                    f"shorten it or rebuild with --text-length {tokens}"
                )
        return self.family.encode_prompt(self.components, prompts, workload)

    def _noise(self, workload: Workload, videos: int, generator: Any, latents: Tensor | None) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        shape = (videos, *self.family.latent_shape(workload))
        if latents is None:
            if isinstance(generator, list) and len(generator) != videos:
                raise InvalidRequest(
                    f"generator: expected {videos}, one per video, got {len(generator)}: give one or {videos}"
                )
            noise = randn_tensor(shape, generator=generator, dtype=torch.float32)
            return self.family.pack(noise)
        packed = self.family.tensors(workload)["latents"].with_rows(videos)
        if tuple(latents.shape) == shape:
            return self.family.pack(latents.float())
        if tuple(latents.shape) != packed:
            raise InvalidRequest(
                f"latents: expected {packed} or {shape} for {workload}, got {tuple(latents.shape)}: "
                "pass latents of the size the engines were built for"
            )
        return latents.float()


def _check_output(output_type: str, decode_options: dict[str, Any]) -> None:
    if output_type not in _OUTPUT_TYPES:
        raise InvalidRequest(
            f"output_type: expected one of {', '.join(_OUTPUT_TYPES)}, got {output_type!r}: choose one"
        )
    unknown = decode_options.keys() - {"decode_timestep", "decode_noise_scale"}
    if unknown:
        raise InvalidRequest(
            f"arguments: expected those of VideoPipeline, got {', '.join(sorted(unknown))}: check the spelling"
        )


def _prompts(prompt: str | list[str] | None, prompt_embeds: Tensor | None) -> list[str] | None:
    if (prompt is None) == (prompt_embeds is None):
        got = "neither" if prompt is None else "both"
        raise InvalidRequest(f"prompt: expected prompt or prompt_embeds, got {got}: give one of them")
    return [prompt] if isinstance(prompt, str) else prompt


def _given(embeds: Tensor | None) -> Tensor:
    assert embeds is not None
    return embeds


def _checked(given: Any, name: str, workload: Workload) -> TextCondition:
    """Embeddings with their mask, padded to the engines' text length."""
    if given.embeds is None or given.mask is None:
        missing = name if given.embeds is None else name.replace("embeds", "attention_mask")
        raise InvalidRequest(f"{missing}: expected a tensor beside the prompt_embeds, got None: pass it too")
    tokens = given.embeds.shape[1]
    if tokens > workload.text_length or given.mask.shape != given.embeds.shape[:2]:
        raise InvalidRequest(
            f"{name}: expected (videos, <= {workload.text_length}, width) with a mask of (videos, tokens), "
            f"got {tuple(given.embeds.shape)} and {tuple(given.mask.shape)}: shorten the text or rebuild with "
            f"--text-length {tokens}"
        )
    missing_tokens = workload.text_length - tokens
    pad = torch.nn.functional.pad
    return TextCondition(
        pad(given.embeds, (0, 0, 0, missing_tokens)), pad(given.mask.float(), (0, missing_tokens))
    )


def _repeated(text: TextCondition, times: int) -> TextCondition:
    return TextCondition(text.embeds.repeat_interleave(times, 0), text.mask.repeat_interleave(times, 0))
