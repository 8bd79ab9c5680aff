"""The prompt of a call, as text or as embeddings, to text conditions for the uncond and cond rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from stg_trt.errors import InvalidRequest
from stg_trt.models.families.base import POOLED
from stg_trt.models.tensor_spec import TensorSpec
from stg_trt.models.text import TextCondition

Encode = Callable[[list[str]], TextCondition]


@dataclass(frozen=True)
class Embeddings:
    """What may be given instead of a text; only some models take pooled embeddings."""

    embeds: Tensor | None
    mask: Tensor | None
    pooled: Tensor | None


@dataclass(frozen=True)
class Prompts:
    """Exactly one of `prompt` and `given.embeds`; raises InvalidRequest otherwise."""

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None
    given: Embeddings
    negative: Embeddings
    videos_per_prompt: int

    def __post_init__(self) -> None:
        embeds = self.given.embeds
        if (self.prompt is None) == (embeds is None):
            got = "neither" if self.prompt is None else "both"
            raise InvalidRequest(f"prompt: expected prompt or prompt_embeds, got {got}: give one of them")
        if embeds is not None and embeds.ndim != 3:
            raise InvalidRequest(
                f"prompt_embeds: expected (videos, tokens, width), got {tuple(embeds.shape)}: "
                "pass one row per video"
            )
        if embeds is None and self.given.pooled is not None:
            raise InvalidRequest(
                f"{POOLED}: expected it beside prompt_embeds, got it beside a prompt: give one of them"
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
        embeds = self.given.embeds
        return (len(self.texts) if embeds is None else len(embeds)) * self.videos_per_prompt

    def conditions(
        self, encode: Encode, specs: Mapping[str, TensorSpec], needs_uncond: bool, needs_mask: bool
    ) -> tuple[TextCondition, TextCondition | None]:
        """Conditions of the cond rows and, where a step computes them, of the uncond rows.

        `specs` are those of the engines; prompt_embeds is (rows, text length, width) there. Without
        `needs_mask`, embeddings given without a mask are all real tokens.
        """
        if self.given.embeds is not None:
            cond = _checked("", self.given, specs, needs_mask)
        else:
            cond = encode(self.texts)
        uncond = self._uncond(encode, specs, needs_mask, len(cond.embeds)) if needs_uncond else None
        times = self.videos_per_prompt
        return cond.repeated(times), uncond.repeated(times) if uncond is not None else None

    def _uncond(
        self, encode: Encode, specs: Mapping[str, TensorSpec], needs_mask: bool, count: int
    ) -> TextCondition:
        if self.given.embeds is not None:
            return _checked("negative_", self.negative, specs, needs_mask, count)
        negative = self.negative_prompt
        texts = list(negative) if isinstance(negative, list) else [negative or ""] * count
        if len(texts) != count:
            raise InvalidRequest(
                f"negative_prompt: expected one text or {count}, got {len(texts)}: give one per prompt"
            )
        return encode(texts)


def _checked(
    prefix: str,
    given: Embeddings,
    specs: Mapping[str, TensorSpec],
    needs_mask: bool,
    count: int | None = None,
) -> TextCondition:
    """Embeddings with their mask, padded to the engines' text length."""
    name, mask_name = f"{prefix}prompt_embeds", f"{prefix}prompt_attention_mask"
    embeds, mask = given.embeds, given.mask
    if mask is None and not needs_mask and embeds is not None:
        mask = embeds.new_ones(embeds.shape[:2])
    embeds, mask = _needed(name, embeds), _needed(mask_name, mask)
    _, length, width = specs["prompt_embeds"].shape
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
    pooled = _checked_pooled(f"{prefix}{POOLED}", given.pooled, specs.get(POOLED), len(embeds))
    missing = length - embeds.shape[1]
    return TextCondition(pad(embeds, (0, 0, 0, missing)), pad(mask.float(), (0, missing)), pooled)


def _checked_pooled(name: str, pooled: Tensor | None, spec: TensorSpec | None, count: int) -> Tensor | None:
    """Pooled embeddings of a model that takes them; None for one that does not."""
    if spec is None:
        if pooled is not None:
            raise InvalidRequest(f"{name}: expected none for this model, got a tensor: leave it out")
        return None
    pooled = _needed(name, pooled)
    if tuple(pooled.shape) != spec.with_rows(count):
        raise InvalidRequest(
            f"{name}: expected {spec.with_rows(count)}, got {tuple(pooled.shape)}: pass pooled embeddings of "
            "this model's second text encoder, one row per video"
        )
    return pooled


def _needed(name: str, tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise InvalidRequest(f"{name}: expected a tensor beside prompt_embeds, got None: pass it too")
    return tensor
