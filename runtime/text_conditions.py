"""What a call's prompts say to the rows with and without the prompt."""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.image import Images
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload

from .components import Components
from .prompts import Prompt, Prompts

_MOST_KEPT = 16


class TextConditions:
    """Texts encoded by the checkpoint's text encoders, or the embeddings that a call gives.

    Those of the last texts are kept: many calls have the same negative prompt, and servers the same prompts.
    """

    def __init__(self, checkpoint: Checkpoint, components: Components) -> None:
        self.checkpoint = checkpoint
        self.family = checkpoint.family
        self.components = components
        self._kept: OrderedDict[object, TextCondition] = OrderedDict()

    def cond(
        self, prompts: Prompts, images: Images | None, workload: Workload, device: torch.device
    ) -> TextCondition:
        """The prompt of every video; some text encoders see its `images` too."""
        return self._of(prompts.cond, images, workload, device).repeated(prompts.videos_per_prompt)

    def uncond(
        self,
        prompts: Prompts,
        cond: TextCondition,
        images: Images | None,
        workload: Workload,
        device: torch.device,
    ) -> TextCondition:
        """The negative prompt of every video; `cond` is its prompt.

        A model with embeddings of its own for no text reads these, as many as the prompt has tokens.
        """
        prompt, times = prompts.uncond, prompts.videos_per_prompt
        if self.family.null_text is None or prompt.texts is None:
            return self._of(prompt, images, workload, device).repeated(times)
        embeds = self._null_text[: workload.text_length].to(cond.embeds)
        null = TextCondition(embeds.expand_as(cond.embeds), cond.mask)
        if not any(prompt.texts):
            return null
        given = self._of(prompt, images, workload, device).repeated(times)
        says = torch.tensor([bool(text) for text in prompt.texts], device=cond.mask.device)
        says = says.repeat_interleave(times)[:, None]
        return TextCondition(
            torch.where(says[..., None], given.embeds, null.embeds), torch.where(says, given.mask, null.mask)
        )

    def _of(
        self, prompt: Prompt, images: Images | None, workload: Workload, device: torch.device
    ) -> TextCondition:
        if not self.family.reads_text:
            return TextCondition.none(prompt.count or 0)
        if prompt.texts is not None:
            return self._of_texts(prompt, prompt.texts, images, workload, device)
        connector = self.family.connector
        text = prompt.padded(
            self.family.tensors(workload),
            self.family.has_text_mask,
            pads_left=connector is not None and connector.pads_left,
        )
        return self._connected(text, device)

    def _of_texts(
        self,
        prompt: Prompt,
        texts: list[str],
        images: Images | None,
        workload: Workload,
        device: torch.device,
    ) -> TextCondition:
        if prompt.prefix and not self.checkpoint.has_text_encoder:
            raise InvalidRequest(
                f"negative_prompt_embeds: expected embeddings beside prompt_embeds, got none, and "
                f"{self.checkpoint.name} has no text encoder: give them, or set guidance_scale to 1"
            )
        sees_images = bool(self.family.text_image_parts) and images is not None
        key = None if sees_images else (tuple(texts), workload, device)
        if key not in self._kept:
            text = self.components.encode(texts, workload, device, prompt.prefix, images)
            text = self._connected(text, device)
            if key is None:
                return text
            self._kept[key] = text
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _connected(self, text: TextCondition, device: torch.device) -> TextCondition:
        text = self.components.connect(text, device)
        self.family.check_text(text)
        return text

    @cached_property
    def _null_text(self) -> Tensor:
        assert self.family.null_text is not None
        return self.checkpoint.weight(self.family.null_text)
