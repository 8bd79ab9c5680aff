"""The checkpoint's text encoders, tokenizers and VAEs, on the device where the engines run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.image import ImageCondition, Images
from stg_trt.models.parts import (
    add_image_parts,
    add_sound_parts,
    load_connector_part,
    load_text_parts,
    load_vae_part,
)
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload

from .stages import Stage, StageClock


class Components:
    """Text side and VAE side of a checkpoint's diffusers pipeline; each is loaded when first asked for.

    With `offload` the text encoders and the VAE are on the device only while they work, which frees their
    memory for the engines and costs a copy per call. With `vae_tiling` the VAE decodes overlapping tiles, of
    its own default size, one after the other; frames that are no larger than a tile are decoded whole.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype | None,
        offload: bool,
        vae_tiling: bool = False,
        clock: StageClock | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._family = checkpoint.family
        self._dtype = dtype
        self._offload = offload
        self.vae_tiling = vae_tiling
        self._clock = clock or StageClock()
        self._text: Any = None
        self._video: Any = None
        self._connector: Any = None
        self._sees = self._sounds = False
        # Tokenizers are one thread's at a time.
        self._tokenizing = Lock()

    def load_text(self, workload: Workload, device: torch.device) -> Any:
        """diffusers' pipeline with the text side; raises InvalidRequest if a part is not whole."""
        if self._text is None:
            if self._family.connector is not None:  # Refused before a text encoder of many gigabytes is read.
                self._load_connector(device)
            with self._clock.stage("load"):
                self._text = load_text_parts(self._checkpoint, self._dtypes(device), workload)
        return self._text

    def load_vae(self, workload: Workload, device: torch.device) -> Any:
        """diffusers' pipeline with the VAE.

        Raises InvalidRequest if it is not whole, or if `vae_tiling` is on and it has no tiling.
        """
        if self._video is None:
            with self._clock.stage("load"):
                pipeline = load_vae_part(self._checkpoint, self._dtypes(device), workload)
            if self.vae_tiling:
                _enable_tiling(pipeline.vae)
            if device.type == "cuda":
                channels_last(pipeline.vae)
            self._video = pipeline
        return self._video

    @property
    def decoder(self) -> Any:
        """diffusers' pipeline with the VAE, or None before it is loaded."""
        return self._video

    def load_decoders(self, workload: Workload, device: torch.device) -> Any:
        """diffusers' pipeline with the VAE and, if the model has sound, the parts that decode it.

        Raises InvalidRequest as `load_vae`.
        """
        pipeline = self.load_vae(workload, device)
        if self._family.sound_decoder is not None and not self._sounds:
            with self._clock.stage("load"):
                add_sound_parts(pipeline, self._checkpoint, self._dtypes(device))
            self._sounds = True
        return pipeline

    def _load_connector(self, device: torch.device) -> Any:
        if self._connector is None:
            with self._clock.stage("load"):
                self._connector = load_connector_part(self._checkpoint, self._dtypes(device))
        return self._connector

    def encode(
        self,
        prompts: list[str],
        workload: Workload,
        device: torch.device,
        prefix: str = "",
        images: Images | None = None,
    ) -> TextCondition:
        """Prompts to embeddings of the workload's text length; raises InvalidRequest for a longer one.

        `prefix` is that of the argument that they come from: empty, or negative_. Some text encoders see the
        call's pictures too.
        """
        pipeline = self.load_text(workload, device)
        encoders = [getattr(pipeline, name) for name in self._checkpoint.text_parts if "encoder" in name]
        self.check_lengths(prompts, workload, prefix)
        with self._on("text", device, *encoders), self._tokenizing:
            if not self._family.text_image_parts:
                return self._family.encode_prompt(pipeline, prompts, workload)
            seen = None if prefix or images is None else images.distinct
            return self._family.encode_seen_prompt(pipeline, prompts, seen, workload)

    def check_lengths(self, prompts: list[str], workload: Workload, prefix: str = "") -> None:
        """Raises InvalidRequest for a prompt of too many tokens; any thread may ask.

        Nothing is known of prompts before the text side is loaded.
        """
        if self._text is None:
            return
        room = self._family.prompt_tokens(workload)
        for prompt in prompts:
            with self._tokenizing:
                tokens = self._family.text_tokens(self._text, prompt)
            if tokens > room:
                raise InvalidRequest(
                    f"{prefix}prompt: expected at most {room} tokens, got {tokens}: "
                    f"shorten it{self._longer(workload, tokens - room)}"
                )

    def connect(self, text: TextCondition, device: torch.device) -> TextCondition:
        """Embeddings of the text encoder, or those that a call gives, to the transformer's.

        The same for most models. Raises InvalidRequest if the part between them is not whole.
        """
        connector = self._family.connector
        if connector is None:
            return text
        part = self._load_connector(device)
        with self._on("text", device, part), torch.no_grad():
            return connector.connect(part, text.to(device, part.dtype))

    def _longer(self, workload: Workload, missing: int) -> str:
        """The build that takes the prompt, if the model can have one."""
        longer = replace(workload, text_length=workload.text_length + missing)
        try:
            self._family.check(longer)
        except InvalidRequest:
            return f", the model reads {workload.text_length}"
        return f" or rebuild with --text-length {longer.text_length}"

    def encode_images(
        self, images: Images, workload: Workload, device: torch.device, videos: int, generator: Any
    ) -> ImageCondition:
        """Pictures to what they add to each of the videos; raises InvalidRequest if a part is not whole."""
        pipeline = self.load_vae(workload, device)
        if not self._sees:
            with self._clock.stage("load"):
                add_image_parts(pipeline, self._checkpoint, self._dtypes(device))
            self._sees = True
        encoder = getattr(pipeline, "image_encoder", None)
        with self._on("image", device, *filter(None, (pipeline.vae, encoder))), torch.no_grad():
            return self._family.encode_images(pipeline, images, workload, videos, generator)

    def decode(
        self,
        latents: Tensor,
        workload: Workload,
        device: torch.device,
        output_type: str,
        on_video: Callable[[Any], None] | None = None,
        **options: Any,
    ) -> Any:
        """Packed latents to frames, as diffusers' video processor returns them for `output_type`.

        `on_video` gets those of each video before the next one is decoded. Raises InvalidRequest if the VAE's
        tiles do not join to frames of the workload's size.
        """
        pipeline = self.load_vae(workload, device)
        expected = (self._family.shown_frames(workload), workload.height, workload.width)
        videos = []
        with self._on("decode", device, pipeline.vae):
            for video in self._family.decode(pipeline, latents.to(device), workload, **options):
                if self.vae_tiling:
                    _check_tiles(tuple(video.shape[2:]), expected)
                videos.append(pipeline.video_processor.postprocess_video(video, output_type=output_type))
                if on_video is not None:
                    with self._clock.stage(None):
                        on_video(videos[-1])
        return _joined(videos)

    def decode_sound(self, latents: Tensor, workload: Workload, device: torch.device) -> tuple[Tensor, int]:
        """Packed latents to waveforms (videos, channels, samples), float32, and their samples per second."""
        decoder, pipeline = self._family.sound_decoder, self.load_decoders(workload, device)
        assert decoder is not None
        parts = (getattr(pipeline, name) for name in decoder.parts)
        with self._on("decode", device, *parts), torch.no_grad():
            return decoder.decode(pipeline, latents.to(device)), decoder.sampling_rate(pipeline)

    def _dtypes(self, device: torch.device) -> dict[str, torch.dtype]:
        """By part, with a default: float32 on the CPU, else bfloat16 and what the family wants in float32."""
        if self._dtype is not None or device.type == "cpu":
            return {"default": self._dtype or torch.float32}
        return {"default": torch.bfloat16, **dict.fromkeys(self._family.float32_components, torch.float32)}

    @contextmanager
    def _on(self, stage: Stage, device: torch.device, *modules: torch.nn.Module) -> Iterator[None]:
        """The modules at work, which are moved to the device and, with offload, back."""
        with self._clock.stage(stage):
            for module in modules:
                module.to(device)
            try:
                yield
            finally:
                if self._offload:
                    for module in modules:
                        module.to("cpu")


def _check_tiles(got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """The configuration of a VAE may ask for tiles that begin between two latents."""
    if got != expected:
        raise InvalidRequest(
            f"vae_tiling: expected the VAE's tiles to join to frames, height and width {expected}, "
            f"got {got}: leave it out"
        )


def _joined(videos: list[Any]) -> Any:
    """What the video processor returns for each video, as it returns them for all at once."""
    if len(videos) == 1:
        return videos[0]
    if isinstance(videos[0], Tensor):
        return torch.cat(videos)
    if isinstance(videos[0], np.ndarray):
        return np.concatenate(videos)
    return [frames for video in videos for frames in video]


def channels_last(vae: torch.nn.Module) -> None:
    """Keeps the weights of convolutions over frames with their channels last, as cuDNN's fastest do."""
    for weight in vae.parameters():
        if weight.ndim == 5:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last_3d)


def _enable_tiling(vae: Any) -> None:
    try:
        vae.enable_tiling()
    except NotImplementedError as error:
        raise InvalidRequest(
            f"vae_tiling: expected a VAE that can decode in tiles, got {type(vae).__name__}: leave it out"
        ) from error
