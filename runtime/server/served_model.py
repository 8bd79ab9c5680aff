"""A checkpoint with the builds that can run here: which of them a request gets, and its video."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch
from PIL import Image

from stg_trt.engines.store import EngineRequest, EngineStore
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.custom_steps import CustomSteps
from stg_trt.models.published import published
from stg_trt.system.gpu import this_machine

from ..arguments import ForeignArguments
from ..output import VideoPipelineOutput
from ..pictures import GivenPictures
from ..pipeline import VideoPipeline
from ..prompts import Embeddings, Prompts
from ..schedule import Request, schedule_steps
from ..video_stream import StreamedStep
from .refusal import Refusal, invalid
from .steps_board import StepPreview, StepTaken
from .video_request import ResolvedRequest, VideoRequest

_NO_EMBEDDINGS = Embeddings(None, None, None)
_WARM_UP_STEPS = 2
_MOST_CHECKED = 1000
# Whole numbers up to here are the same in JavaScript.
_SEEDS = 1 << 53


@dataclass(frozen=True)
class ModelSource:
    """A model's checkpoint and engines; the options are those of VideoPipeline.from_pretrained."""

    name: str
    checkpoint: str
    engines: tuple[Path, ...]
    variant: str | None = None
    revision: str | None = None
    lora: tuple[str, ...] = ()
    layout: str | None = None
    backend: str | None = None
    offload: bool = False
    vae_tiling: bool = False
    guidance_parallel: int = 1


@dataclass(frozen=True)
class Size:
    """Pixels and frames of a build."""

    width: int
    height: int
    num_frames: int

    @property
    def pixels(self) -> str:
        """As OpenAI writes a size."""
        return f"{self.width}x{self.height}"


class ServedModel:
    """One model; its pipeline runs in one thread, `resolve` and `check` in any."""

    def __init__(self, name: str, pipeline: VideoPipeline, fits: EngineRequest) -> None:
        self.name = name
        self.pipeline = pipeline
        self.family = pipeline.family
        self._fits = fits
        self.created_at = int(time.time())
        store = pipeline.store
        workloads = [store.find(fits).manifest.workload]
        workloads += [one.manifest.workload for one in store.builds if fits.rejects(one.manifest) is None]
        # The pipeline's own choice comes first.
        self.sizes = tuple(dict.fromkeys(Size(w.width, w.height, w.num_frames) for w in workloads))
        # The pipeline's scheduler belongs to the video that is being made.
        self._scheduler = pipeline.checkpoint.scheduler()
        self._checking = threading.Lock()
        self._checked: set[str] = set()

    @classmethod
    def open(cls, source: ModelSource, *, elsewhere: bool = False) -> ServedModel:
        """Raises InvalidRequest or EngineRejected if checkpoint and engines cannot make videos here.

        With `elsewhere` other processes make the videos: every build counts, whatever machine it is for.
        """
        checkpoint = Checkpoint.open(
            source.checkpoint,
            random_weights=source.checkpoint in published(),
            variant=source.variant,
            revision=source.revision,
            lora=source.lora,
        )
        if checkpoint.family.reads_text:
            checkpoint.check_text()
        for check in (checkpoint.check_connector, checkpoint.check_vae, checkpoint.check_sound):
            check()
        store = _joined([EngineStore.open(folder) for folder in source.engines])
        fits = EngineRequest(
            weights=checkpoint.fingerprint(),
            lora=checkpoint.applied_lora,
            layout=source.layout,
            backend=source.backend,
            machine=None if elsewhere else this_machine(),
        )
        pipeline = VideoPipeline(
            checkpoint,
            store,
            layout=source.layout,
            backend=source.backend,
            offload=source.offload,
            vae_tiling=source.vae_tiling,
            guidance_parallel=source.guidance_parallel,
        )
        return cls(source.name, pipeline, fits)

    def resolve(self, request: VideoRequest) -> ResolvedRequest:
        """Fills in size, frames, rate and seed; raises Refusal for a size that is not built."""
        if self.family.reads_text and not request.prompt.strip():
            raise invalid("prompt", "expected a text, got none: say what the video shows", "missing")
        if request.seconds is not None and request.num_frames is not None:
            raise invalid("seconds", "expected seconds or num_frames, got both: leave one out")
        fps = request.fps or self.family.defaults.frame_rate
        size = self._choose(request, fps)
        filled = {
            "model": self.name,
            "size": None,
            "width": size.width,
            "height": size.height,
            "seconds": None,
            "num_frames": size.num_frames,
            "fps": fps,
            "seed": secrets.randbelow(_SEEDS) if request.seed is None else request.seed,
        }
        return ResolvedRequest.model_validate(request.model_dump() | filled)

    def fits(self, request: VideoRequest) -> bool:
        """True if the size that a request names is built."""
        return bool(self._of_pixels(request))

    def check(self, request: ResolvedRequest, picture: Image.Image | None) -> None:
        """Raises StgTrtError for what the pipeline would refuse before the first step.

        Texts of too many tokens are found once a first video has loaded the tokenizer.
        """
        foreign = ForeignArguments.read(_rare(request), None, None, request.fps)
        pictures = GivenPictures(picture, options=foreign.images)
        reads_text = self.family.reads_text
        prompts = Prompts(
            request.prompt if reads_text else None,
            request.negative_prompt,
            _NO_EMBEDDINGS,
            _NO_EMBEDDINGS,
            1,
            None if reads_text else pictures.count,
        )
        foreign.check(self.family, prompts.videos)
        images = pictures.read(self.family, prompts)
        sizes = replace(self._fits, height=request.height, width=request.width, num_frames=request.num_frames)
        if reads_text:
            workload = self.pipeline.store.find(sizes).manifest.workload
            self.pipeline.components.check_lengths([request.prompt], workload)
            if request.negative_prompt is not None:
                self.pipeline.components.check_lengths([request.negative_prompt], workload, "negative_")
        steps = CustomSteps.read(request.timesteps, request.sigmas)
        call = Request(
            sizes, prompts, pictures, request.guidance, request.num_inference_steps, request.fps, None, None,
            None, steps, foreign.sound,
        )  # fmt: skip
        # A solver's table takes up to a second, and most requests of a server differ in their texts alone.
        texts = {"prompt", "negative_prompt", "seed"}
        same = f"{request.model_dump_json(exclude=texts)} {images is None} {request.negative_prompt is None}"
        with self._checking:
            if same in self._checked:
                return
            if len(self._checked) >= _MOST_CHECKED:
                self._checked.clear()
            schedule_steps(call, images, self.pipeline.store, self.family, self._scheduler)
            self._checked.add(same)

    def generate(
        self, request: ResolvedRequest, picture: Image.Image | None, on_step: Callable[[StepTaken], None]
    ) -> VideoPipelineOutput:
        """Frames (1, frames, height, width, 3) in 0..1, and sound; `on_step` may raise to stop.

        Same arguments, same frames: they are those of `stg-trt generate` with this seed.
        """
        stream = self.pipeline.stream(
            prompt=[request.prompt] if self.family.reads_text else None,
            negative_prompt=request.negative_prompt,
            image=picture,
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            frame_rate=request.fps,
            num_inference_steps=request.num_inference_steps,
            timesteps=request.timesteps,
            sigmas=request.sigmas,
            guidance=request.guidance,
            generator=torch.Generator().manual_seed(request.seed),
            output_type="np",
            **_rare(request),
        )
        with stream:
            for step in stream:
                on_step(_taken(step, request))
        return stream.output

    def warm_up_request(self) -> tuple[ResolvedRequest, Image.Image | None]:
        """A short run of the default size, which loads all that later runs need."""
        request = self.resolve(VideoRequest(prompt="warm-up", seed=0, num_inference_steps=_WARM_UP_STEPS))
        picture = None
        if self.family.needed_images:
            picture = Image.new("RGB", (request.width, request.height), "grey")
        return request, picture

    def _choose(self, request: VideoRequest, fps: float) -> Size:
        """The build's size that a request gets."""
        of_pixels = self._of_pixels(request)
        if not of_pixels:
            name = "size" if request.size else "width" if request.width else "height"
            built = ", ".join(dict.fromkeys(size.pixels for size in self.sizes))
            got = request.size or f"{request.width or 'any'}x{request.height or 'any'}"
            raise invalid(name, f"expected one that is built for {self.name}: {built}, got {got}: take one")
        same = [size for size in of_pixels if size.pixels == of_pixels[0].pixels]
        if request.seconds is not None:
            wanted = request.seconds * fps
            return min(same, key=lambda size: (abs(size.num_frames - wanted), size.num_frames))
        if request.num_frames is None:
            return same[0]
        found = [size for size in of_pixels if size.num_frames == request.num_frames]
        if not found:
            built = ", ".join(str(frames) for frames in sorted({size.num_frames for size in of_pixels}))
            raise invalid(
                "num_frames",
                f"expected a number that is built for {same[0].pixels}: {built}, got {request.num_frames}: "
                "take one",
            )
        return found[0]

    def _of_pixels(self, request: VideoRequest) -> list[Size]:
        width, height = request.pixels
        return [size for size in self.sizes if width in (None, size.width) and height in (None, size.height)]


def _taken(step: StreamedStep, request: ResolvedRequest) -> StepTaken:
    preview = None
    if step.preview is not None:
        preview = StepPreview(step.preview[0], request.num_frames / request.fps)
    return StepTaken(step.index + 1, step.steps, step.noise_level, step.seconds, step.distances, preview)


class ServedModels:
    """The models of a server; the first is the default."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.name: model for model in models}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def get(self, name: str) -> ServedModel:
        """A model by its name; raises Refusal 404 for others."""
        if name not in self._models:
            raise Refusal(
                404,
                f"model: expected one of {', '.join(self._models)}, got {name[:80]!r}: take one",
                code="model_not_found",
                param="model",
            )
        return self._models[name]

    def choose(self, request: VideoRequest) -> ServedModel:
        """By name; without one, or with OpenAI's own, the first that has the size, else the first."""
        if request.model is not None and not request.model.startswith("sora-2"):
            return self.get(request.model)
        models = [*self._models.values()]
        return next((model for model in models if model.fits(request)), models[0])


def _joined(stores: Sequence[EngineStore]) -> EngineStore:
    """The builds of several folders as one store."""
    for store in stores:
        store.check_has_builds()
    builds = tuple(build for store in stores for build in store.builds)
    unreadable = {name: reason for store in stores for name, reason in store.unreadable.items()}
    return replace(stores[0], builds=builds, unreadable=unreadable)


class _RareArguments(TypedDict, total=False):
    """Arguments of single families, of which a call may have those alone that are given."""

    motion_bucket_id: float
    noise_aug_strength: float
    image_crf: int
    decode_chunk_size: int


def _rare(request: ResolvedRequest) -> _RareArguments:
    arguments: _RareArguments = {}
    if request.motion_bucket_id is not None:
        arguments["motion_bucket_id"] = request.motion_bucket_id
    if request.noise_aug_strength is not None:
        arguments["noise_aug_strength"] = request.noise_aug_strength
    if request.image_crf is not None:
        arguments["image_crf"] = request.image_crf
    if request.decode_chunk_size is not None:
        arguments["decode_chunk_size"] = request.decode_chunk_size
    return arguments
