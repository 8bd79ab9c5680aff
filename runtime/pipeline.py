"""Prompt to video with compiled engines, under diffusers' argument names."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stg_trt.engines.store import EngineRequest, EngineStore
from stg_trt.errors import InvalidRequest
from stg_trt.guidance.bins import Scale, SkipBlocks, SkipScales
from stg_trt.guidance.options import GuidanceOptions, choose_options
from stg_trt.guidance.tables import Guidance
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.custom_steps import CustomSteps, Numbers
from stg_trt.models.image import ImageCondition, Images
from stg_trt.models.published import published
from stg_trt.system.callers import level_outside
from stg_trt.system.gpu import this_machine

from .arguments import ForeignArguments
from .call import Call, with_arguments_of
from .callbacks import (
    StepCallback,
    VideoCallback,
    call_back,
    check_callback,
    check_video_callback,
    shown_to,
)
from .components import Components
from .device_memory import explain_memory
from .noise import Generators, NoiseSource, listed, starting_noise, starting_sound
from .output import VideoPipelineOutput
from .pictures import GivenPictures, Pictures
from .previews import Previews, shares_of
from .prompts import Embeddings, Prompts
from .run_inputs import RunInputs
from .sampler import SampledStep, check_finite
from .samplers import Samplers
from .schedule import Request, Schedule, schedule_steps
from .stages import StageClock
from .text_conditions import TextConditions
from .turns import Turns
from .video_stream import StepViewer, StreamedStep, VideoStream

# Attributes of diffusers' pipelines that their callbacks set.
_GUIDANCE_OF_DIFFUSERS = ("_guidance_scale", "_guidance_rescale", "_stg_scale", "guidance_scale")
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_LESS_TO_SAMPLE = "fewer frames, a smaller size, fewer videos at once, the segmented layout, or --offload"
_LESS_TO_DECODE = "fewer frames, a smaller size, or --offload"


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
        guidance_parallel: int = 1,
    ) -> None:
        self.checkpoint = checkpoint
        self.family = checkpoint.family
        self._clock = StageClock()
        self.components = Components(checkpoint, dtype, offload, vae_tiling, self._clock)
        self._texts = TextConditions(checkpoint, self.components)
        self.store = store
        self.scheduler = checkpoint.scheduler()
        self.interrupt = False
        self.num_timesteps = self.num_videos = 0
        self._warned = False
        self._turns = Turns()
        self._request = EngineRequest(
            weights=checkpoint.fingerprint(),
            lora=checkpoint.applied_lora,
            layout=layout,
            backend=backend,
            machine=this_machine(),
        )
        self._samplers = Samplers(self.family, self._clock, guidance_parallel)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        engines: str | Path,
        *,
        variant: str | None = None,
        revision: str | None = None,
        lora: Sequence[str | Path] = (),
        layout: str | None = None,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        offload: bool = False,
        vae_tiling: bool = False,
        guidance_parallel: int = 1,
    ) -> VideoPipeline:
        """Opens a checkpoint and a folder of engines built from it; raises an error if they do not fit.

        `checkpoint`, `variant`, `revision` and `lora` are those of the build, see `Checkpoint.open`. `dtype`
        is that of text encoder and VAE (default: bfloat16 on a GPU, else float32); `offload` keeps them off
        the GPU while they are not needed. `vae_tiling` is diffusers' `vae.enable_tiling()`: less memory for
        large frames, blended from overlapping tiles, so not exactly those of decoding them whole. The passes
        of a step are shared by `guidance_parallel` GPUs, of which all but the first have processes of their
        own.
        """
        opened = Checkpoint.open(
            checkpoint,
            random_weights=str(checkpoint) in published(),
            variant=variant,
            revision=revision,
            lora=lora,
        )
        pipeline = cls(
            opened,
            EngineStore.open(engines),
            layout=layout,
            backend=backend,
            dtype=dtype,
            offload=offload,
            vae_tiling=vae_tiling,
            guidance_parallel=guidance_parallel,
        )
        pipeline.store.find(pipeline._request)
        return pipeline

    @property
    def _interrupt(self) -> bool:
        """diffusers' name of `interrupt`, which callbacks set."""
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, stop: bool) -> None:
        self.interrupt = stop

    def __setattr__(self, name: str, value: object) -> None:
        if name in _GUIDANCE_OF_DIFFUSERS:
            raise InvalidRequest(
                f"{name}: expected guidance to be known before the first step, got another value on the way: "
                "give guidance_scale, stg_scale and rescale one value per step"
            )
        super().__setattr__(name, value)

    def _read(
        self,
        /,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        image: Pictures | None = None,
        last_image: Pictures | None = None,
        conditions: Sequence[object] | object = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        frame_rate: float | None = None,
        num_inference_steps: int | None = None,
        timesteps: Numbers | None = None,
        sigmas: Numbers | None = None,
        guidance_scale: Scale | None = None,
        true_cfg_scale: Scale | None = None,
        stg_scale: SkipScales | None = None,
        stg_mode: str | None = None,
        stg_blocks: SkipBlocks | None = None,
        stg_range: tuple[int, int] | None = None,
        rescale: Scale | None = None,
        cfg_zero_star: bool | None = None,
        preset: str | None = None,
        use_dynamic_cfg: bool = False,
        num_videos_per_prompt: int = 1,
        generator: Generators | tuple[torch.Generator, ...] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_video_end: VideoCallback | None = None,
        guidance: GuidanceOptions | None = None,
        **options: Any,
    ) -> Call:
        foreign = ForeignArguments.read(options, stg_blocks, rescale, frame_rate)
        guided = choose_options(guidance, GuidanceOptions(
            guidance_scale, stg_scale, foreign.rescale, stg_mode, foreign.stg_blocks, stg_range, preset,
            cfg_zero_star, use_dynamic_cfg, true_cfg_scale, **foreign.scales,
        ))  # fmt: skip
        cond = Embeddings(prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
        uncond = Embeddings(
            negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds
        )
        pictures = GivenPictures(image, last_image, conditions, foreign.images)
        count = None if self.family.reads_text else pictures.count
        prompts = Prompts(prompt, negative_prompt, cond, uncond, num_videos_per_prompt, count)
        request = Request(
            replace(self._request, height=height, width=width, num_frames=num_frames, videos=prompts.videos),
            prompts, pictures, guided, num_inference_steps, foreign.frame_rate, listed(generator), latents,
            foreign.max_sequence_length, CustomSteps.read(timesteps, sigmas), foreign.sound,
        )  # fmt: skip
        return Call(request, output_type, callback_on_step_end, callback_on_video_end, foreign)

    @with_arguments_of(_read)
    def __call__(self, call: Call) -> VideoPipelineOutput:
        """Generates videos; omitted arguments come from the engines (sizes, blocks) or the family's defaults.

        `guidance` holds all scales; CFG is off at 1 and below. `options` are for decoding, or those of other
        pipelines. Raises InvalidRequest, EngineRejected if no engines fit, and NotFinite.
        """
        run = VideoStream(self._run(call, live=False))
        for _ in run:
            pass
        return run.output

    @with_arguments_of(_read)
    def stream(self, call: Call) -> VideoStream:
        """Generates videos step by step, from the arguments of a call; it begins with the first step.

        Every step waits until the GPU has taken it, where a call lets it run ahead. Raises what a call does.
        """
        return VideoStream(self._run(call, live=True))

    # Static memory made in inference mode could not be written outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _run(self, call: Call, live: bool) -> Generator[StreamedStep, None, VideoPipelineOutput]:
        """A call up to its answer; `live` shows every step as soon as it has been taken."""
        request, foreign, output_type = call.request, call.foreign, call.output_type
        check_callback(call.callback, foreign.callback_tensors, [one.latents for one in self.family.streams])
        if output_type not in _OUTPUT_TYPES:
            raise InvalidRequest(
                f"output_type: expected one of {', '.join(_OUTPUT_TYPES)}, got {output_type!r}: choose one"
            )
        check_video_callback(call.on_video, output_type)
        foreign.check(self.family, request.prompts.videos)
        images = request.pictures.read(self.family, request.prompts)
        with self._turns, self._clock.call():
            schedule = self._schedule(request, images)
            if output_type != "latent":  # A part that cannot decode is refused before the sampling.
                device = self._samplers.device(schedule.build).torch_device
                self.components.load_decoders(schedule.workload, device)
            starts, image = self._start(schedule, request, images)
            with explain_memory(schedule.build.manifest, "GPU memory", _LESS_TO_SAMPLE):
                steps = self._steps(schedule, request, starts, image, images)
                viewer = self._viewer(schedule, starts["latents"], image) if live else None
                result = yield from self._taken(steps, starts, call.callback, viewer)
            result["latents"] = self.family.finished(result["latents"], schedule.workload, image)
            output = self._output(result, schedule, call)
        output.stages = self._clock.seconds
        return output

    def _schedule(self, request: Request, images: Images | None) -> Schedule:
        schedule = schedule_steps(request, images, self.store, self.family, self.scheduler)
        self.num_timesteps, self.num_videos = schedule.guidance.num_steps, request.prompts.videos
        if self.family.takes_true_cfg and schedule.guidance.needs_uncond and not request.prompts.has_negative:
            raise InvalidRequest(
                "true_cfg_scale: expected a negative prompt beside it, without which diffusers has no CFG, "
                "got none: give negative_prompt, such as an empty text"
            )
        self._warn_of_second_guidance(schedule.guidance)
        return schedule

    def _start(
        self, schedule: Schedule, request: Request, images: Images | None
    ) -> tuple[dict[str, Tensor], ImageCondition | None]:
        """What a run's streams start from, and what pictures add, which both draw from the generator."""
        image = None
        if not self.family.draws_noise_first:
            image = self._image(schedule, request, images)
        place = self.family, schedule.workload, request.prompts.videos
        given, share = request.latents, request.sound.noise_scale
        noise = starting_noise(*place, NoiseSource(request.generator, given, share))
        if self.family.draws_noise_first:
            image = self._image(schedule, request, images)
        start = noise * schedule.solver.noise_scale
        if given is None or not self.family.starts_from_given_latents:
            start = self.family.start(start, image)
        elif share and image is not None and image.clean is not None:
            # Clean latents that are given get no share of the noise.
            start = torch.where(image.clean.strength > 0, given.float(), start)
        sound = starting_sound(*place, NoiseSource(request.generator, request.sound.latents, share))
        if sound is None:
            return {"latents": start}, image
        return {"latents": start, "audio_latents": sound * schedule.solver.noise_scale}, image

    def _image(self, schedule: Schedule, request: Request, images: Images | None) -> ImageCondition | None:
        """What the call's pictures add; None without any."""
        generator, videos = request.generator, request.prompts.videos
        if isinstance(generator, list) and len(generator) != videos:
            raise InvalidRequest(
                f"generator: expected one or {videos}, got {len(generator)}: give one per video"
            )
        if images is None:
            return None
        if images.options.image_latents is not None:
            return self.family.given_images(images, schedule.workload, videos)
        device = self._samplers.device(schedule.build).torch_device
        return self.components.encode_images(images, schedule.workload, device, videos, generator)

    def _steps(
        self,
        schedule: Schedule,
        request: Request,
        starts: dict[str, Tensor],
        image: ImageCondition | None,
        images: Images | None,
    ) -> Iterator[SampledStep]:
        prompts, guidance = request.prompts, schedule.guidance
        place = images, schedule.workload, self._samplers.device(schedule.build).torch_device
        cond = self._texts.cond(prompts, *place)
        uncond = self._texts.uncond(prompts, cond, *place) if guidance.needs_uncond else None
        return self._samplers.steps(schedule.build, RunInputs(
            starts, cond, uncond, guidance, schedule.solver, schedule.frame_rate, request.generator, image
        ))  # fmt: skip

    def _output(self, result: dict[str, Tensor], schedule: Schedule, call: Call) -> VideoPipelineOutput:
        latents, audio_latents, workload = result["latents"], result.get("audio_latents"), schedule.workload
        if call.output_type == "latent":
            return VideoPipelineOutput(self.family.returned(latents, workload), audio_latents)
        device = self._samplers.device(schedule.build).torch_device
        less = _LESS_TO_DECODE if self.components.vae_tiling else f"--vae-tiling, {_LESS_TO_DECODE}"
        with explain_memory(schedule.build.manifest, "GPU memory of decoding", less):
            audio, rate = None, None
            if audio_latents is not None:
                audio, rate = self.components.decode_sound(audio_latents, workload, device)
            on_video = None if call.on_video is None else shown_to(self, call.on_video, audio, rate)
            options = {"generator": call.request.generator, **call.foreign.decode_options}
            place = workload, device, call.output_type
            return VideoPipelineOutput(
                self.components.decode(latents, *place, on_video, **options), audio, rate
            )

    def _taken(
        self,
        steps: Iterator[SampledStep],
        starts: dict[str, Tensor],
        callback: StepCallback | None,
        viewer: StepViewer | None,
    ) -> Generator[StreamedStep, None, dict[str, Tensor]]:
        """The latents after the last step; `interrupt` (settable on the way) stops after the current one."""
        self.interrupt = False
        step = None
        finite = []
        for step in steps:
            finite.append(step.finite)
            if callback is not None:
                call_back(self, callback, step)
            if viewer is not None:
                check_finite(finite)
                shown = viewer.show(step)
                with self._clock.stage(None):
                    yield shown
            if self.interrupt:
                break
        check_finite(finite)
        return starts if step is None else step.of_streams

    def _viewer(self, schedule: Schedule, start: Tensor, image: ImageCondition | None) -> StepViewer:
        colours, decoder = schedule.build.manifest.preview, self.components.decoder
        if colours is None or decoder is None:
            return StepViewer(schedule, self._clock, None)
        shares = shares_of(schedule.solver, self.scheduler)
        previews = Previews(colours, self.family, schedule.workload, decoder, shares, image, start)
        return StepViewer(schedule, self._clock, previews)

    def _warn_of_second_guidance(self, guidance: Guidance) -> None:
        """Once: CFG on top of the guidance that a distilled model takes as an input."""
        scale = next((scale for scale in guidance.cfg_scale if scale != 1), None)
        if scale is None or self.family.embedded_guidance is None or self._warned:
            return
        self._warned = True
        warnings.warn(
            f"true_cfg_scale: expected 1 for {self.family.name}, which is distilled and takes "
            f"guidance_scale instead, got {scale}: CFG on top of it doubles the work with one more pass "
            "per step; leave true_cfg_scale out to save it",
            stacklevel=level_outside(),
        )
