"""The checkpoint's text encoders, tokenizers and VAE, on the device where the engines run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.base import load_class
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload


class Components:
    """The diffusers pipeline of a checkpoint without its transformer; loaded when first asked for.

    With `offload` the text encoders and the VAE are on the device only while they work, which frees their
    memory for the engines and costs a copy per call. With `vae_tiling` the VAE decodes overlapping tiles, of
    its own default size, one after the other; frames that are no larger than a tile are decoded whole.
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype | None, offload: bool, vae_tiling: bool = False
    ) -> None:
        self._checkpoint = checkpoint
        self._family = checkpoint.family
        self._dtype = dtype
        self._offload = offload
        self.vae_tiling = vae_tiling
        self._pipeline: Any = None

    def load(self, device: torch.device) -> None:
        """Raises InvalidRequest if text encoder or VAE are missing or incomplete, or if `vae_tiling` is
        on and the VAE has no tiling.
        """
        if self._pipeline is not None:
            return
        self._checkpoint.check_pipeline()
        name = self._family.pipeline_class
        dtype = self._dtype or self._usual_dtypes(device)
        try:
            pipeline = load_class(name).from_pretrained(
                self._checkpoint.folder, transformer=None, dtype=dtype
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InvalidRequest(
                f"checkpoint: expected a whole {name} folder, got {reason}: download it again"
            ) from error
        if self.vae_tiling:
            _enable_tiling(pipeline.vae)
        self._pipeline = pipeline

    def encode(self, prompts: list[str], workload: Workload, device: torch.device) -> TextCondition:
        """Prompts to embeddings of the workload's text length; raises InvalidRequest for a longer one."""
        self.load(device)
        for prompt in prompts:
            tokens = self._family.text_tokens(self._pipeline, prompt)
            if tokens > workload.text_length:
                raise InvalidRequest(
                    f"prompt: expected at most {workload.text_length} tokens, got {tokens}: "
                    f"shorten it or rebuild with --text-length {tokens}"
                )
        encoders = [name for name in self._pipeline.components if name.startswith("text_encoder")]
        with self._on(device, *encoders):
            return self._family.encode_prompt(self._pipeline, prompts, workload)

    def decode(
        self, latents: Tensor, workload: Workload, device: torch.device, output_type: str, **options: Any
    ) -> Any:
        """Packed latents to frames, as diffusers' video processor returns them for `output_type`.

        Raises InvalidRequest if the VAE's tiles do not join to frames of the workload's size.
        """
        self.load(device)
        with self._on(device, "vae"):
            video = self._family.decode(self._pipeline, latents.to(device), workload, **options)
        expected = (workload.num_frames, workload.height, workload.width)
        # The configuration of a VAE may ask for tiles that begin between two latents.
        if self.vae_tiling and video.shape[2:] != expected:
            raise InvalidRequest(
                f"vae_tiling: expected the VAE's tiles to join to frames, height and width {expected}, got "
                f"{tuple(video.shape[2:])}: leave it out"
            )
        return self._pipeline.video_processor.postprocess_video(video, output_type=output_type)

    def _usual_dtypes(self, device: torch.device) -> torch.dtype | dict[str, torch.dtype]:
        """float32 on the CPU, else bfloat16 except the parts that the family wants in float32."""
        if device.type == "cpu":
            return torch.float32
        wide = dict.fromkeys(self._family.float32_components, torch.float32)
        return {"default": torch.bfloat16, **wide}

    @contextmanager
    def _on(self, device: torch.device, *names: str) -> Iterator[None]:
        modules = [getattr(self._pipeline, name) for name in names]
        for module in modules:
            module.to(device)
        try:
            yield
        finally:
            if self._offload:
                for module in modules:
                    module.to("cpu")


def _enable_tiling(vae: Any) -> None:
    try:
        vae.enable_tiling()
    except NotImplementedError as error:
        raise InvalidRequest(
            f"vae_tiling: expected a VAE that can decode in tiles, got {type(vae).__name__}: leave it out"
        ) from error
