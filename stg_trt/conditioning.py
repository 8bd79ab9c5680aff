"""The prompt of a call, as text or as embeddings, to text conditions for the uncond and cond rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from stg_trt.errors import InvalidRequest
from stg_trt.families.base import TextCondition
from stg_trt.tensor_spec import TensorSpec

Encode = Callable[[list[str]], TextCondition]


@dataclass(frozen=True)
class Prompts:
    """Exactly one of `prompt` and `embeds`; raises InvalidRequest otherwise."""

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None
    embeds: Tensor | None
    mask: Tensor | None
    negative_embeds: Tensor | None
    negative_mask: Tensor | None
    videos_per_prompt: int

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.embeds is None):
            got = "neither" if self.prompt is None else "both"
            raise InvalidRequest(f"prompt: expected prompt or prompt_embeds, got {got}: give one of them")
        if self.embeds is not None and self.embeds.ndim != 3:
            raise InvalidRequest(
                f"prompt_embeds: expected (videos, tokens, width), got {tuple(self.embeds.shape)}: "
                "pass one row per video"
            )
        if self.videos_per_prompt < 1:
            raise InvalidRequest(
                f"num_videos_per_prompt: expected at least 1, got {self.videos_per_prompt}: use 1"
            )
        if self.videos == 0:
            raise InvalidRequest("prompt: expected at least one prompt, got an empty list: give one")

    @property
    def texts(self) -> list[str]:
        """The prompts as a list; empty where embeddings were given."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt or [])

    @property
    def videos(self) -> int:
        """Videos to generate."""
        return (len(self.texts) if self.embeds is None else len(self.embeds)) * self.videos_per_prompt

    def conditions(
        self, encode: Encode, spec: TensorSpec, needs_uncond: bool, needs_mask: bool
    ) -> tuple[TextCondition, TextCondition | None]:
        """Conditions of the cond rows and, where a step computes them, of the uncond rows.

        `spec` is that of prompt_embeds in the engines: (rows, text length, width). Without `needs_mask`,
        embeddings given without a mask are all real tokens.
        """
        if self.embeds is not None:
            cond = _checked("prompt_embeds", self.embeds, self.mask, spec, needs_mask)
        else:
            cond = encode(self.texts)
        uncond = self._uncond(encode, spec, needs_mask, len(cond.embeds)) if needs_uncond else None
        times = self.videos_per_prompt
        return cond.repeated(times), uncond.repeated(times) if uncond is not None else None

    def _uncond(self, encode: Encode, spec: TensorSpec, needs_mask: bool, count: int) -> TextCondition:
        if self.embeds is not None:
            return _checked(
                "negative_prompt_embeds", self.negative_embeds, self.negative_mask, spec, needs_mask, count
            )
        negative = self.negative_prompt
        texts = list(negative) if isinstance(negative, list) else [negative or ""] * count
        if len(texts) != count:
            raise InvalidRequest(
                f"negative_prompt: expected one text or {count}, got {len(texts)}: give one per prompt"
            )
        return encode(texts)


def _checked(
    name: str,
    embeds: Tensor | None,
    mask: Tensor | None,
    spec: TensorSpec,
    needs_mask: bool,
    count: int | None = None,
) -> TextCondition:
    """Embeddings with their mask, padded to the engines' text length."""
    mask_name = name.replace("embeds", "attention_mask")
    if mask is None and not needs_mask and embeds is not None:
        mask = embeds.new_ones(embeds.shape[:2])
    for tensor_name, tensor in ((name, embeds), (mask_name, mask)):
        if tensor is None:
            raise InvalidRequest(
                f"{tensor_name}: expected a tensor beside prompt_embeds, got None: pass it too"
            )
    assert embeds is not None and mask is not None
    _, length, width = spec.shape
    assert isinstance(length, int)
    fits = embeds.ndim == 3 and embeds.shape[1] <= length and embeds.shape[2] == width
    if not fits or (count is not None and len(embeds) != count):
        raise InvalidRequest(
            f"{name}: expected ({count or 'videos'}, <= {length}, {width}), got {tuple(embeds.shape)}: "
            "pass embeddings of this model's text encoder, or rebuild with a larger --text-length"
        )
    if mask.shape != embeds.shape[:2]:
        raise InvalidRequest(
            f"{mask_name}: expected {tuple(embeds.shape[:2])}, got {tuple(mask.shape)}: one entry per token"
        )
    missing = length - embeds.shape[1]
    return TextCondition(pad(embeds, (0, 0, 0, missing)), pad(mask.float(), (0, missing)))
