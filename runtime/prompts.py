"""The prompt of a call, as text or as embeddings, to text conditions for the uncond and cond rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from stg_trt.errors import InvalidRequest
from stg_trt.models.families.base import POOLED
from stg_trt.models.tensor_spec import TensorSpec
from stg_trt.models.text import TextCondition


@dataclass(frozen=True)
class Embeddings:
    """Embeddings given instead of a text; only some models take pooled ones."""

    embeds: Tensor | None
    mask: Tensor | None
    pooled: Tensor | None


@dataclass(frozen=True)
class Prompt:
    """The condition of one pass: texts to encode, or embeddings if `texts` is None.

    `prefix` is that of the embeddings' arguments: empty, or negative_. `count` is how many videos the
    embeddings must have; None leaves it to them.
    """

    texts: list[str] | None
    given: Embeddings
    prefix: str = ""
    count: int | None = None

    def padded(
        self, specs: Mapping[str, TensorSpec], needs_mask: bool, *, pads_left: bool = False
    ) -> TextCondition:
        """The embeddings that were given, padded to the engines' text length.

        `specs` are those of the engines; prompt_embeds is (rows, text length, width) there. Without
        `needs_mask`, embeddings given without a mask are all real tokens. With `pads_left`, padding stands
        before the real tokens. Raises InvalidRequest for other embeddings.
        """
        embeds, mask = self._embeds_and_mask(needs_mask)
        _, length, width = specs["prompt_embeds"].shape
        assert isinstance(length, int)
        fits = embeds.ndim == 3 and embeds.shape[1] <= length and embeds.shape[2] == width
        if not fits or (self.count is not None and len(embeds) != self.count):
            raise InvalidRequest(
                f"{self.prefix}prompt_embeds: expected ({self.count or 'videos'}, <= {length}, {width}), "
                f"got {tuple(embeds.shape)}: pass embeddings of this model's text encoder, or rebuild with a "
                "larger --text-length"
            )
        if not embeds.isfinite().all():
            raise InvalidRequest(
                f"{self.prefix}prompt_embeds: expected finite numbers, got NaN or infinity: check where "
                "they come from"
            )
        if mask.shape != embeds.shape[:2]:
            raise InvalidRequest(
                f"{self.prefix}prompt_attention_mask: expected {tuple(embeds.shape[:2])}, got "
                f"{tuple(mask.shape)}: one entry per token"
            )
        name = f"{self.prefix}{POOLED}"
        pooled = _checked_pooled(name, self.given.pooled, specs.get(POOLED), len(embeds))
        if pads_left:
            _check_pads_left(f"{self.prefix}prompt_attention_mask", mask)
        missing = length - embeds.shape[1]
        room = (missing, 0) if pads_left else (0, missing)
        return TextCondition(pad(embeds, (0, 0, *room)), pad(mask.float(), room), pooled)

    def _embeds_and_mask(self, needs_mask: bool) -> tuple[Tensor, Tensor]:
        embeds = _needed(f"{self.prefix}prompt_embeds", self.given.embeds)
        mask = self.given.mask
        if mask is None and not needs_mask:
            return embeds, embeds.new_ones(embeds.shape[:2])
        return embeds, _needed(f"{self.prefix}prompt_attention_mask", mask)


@dataclass(frozen=True)
class Prompts:
    """Exactly one of `prompt` and `given.embeds`; raises InvalidRequest otherwise.

    A model without text has neither, and `pictures` instead.
    """

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None
    given: Embeddings
    negative: Embeddings
    videos_per_prompt: int
    pictures: int | None = None

    def __post_init__(self) -> None:
        embeds = self.given.embeds
        if self.pictures is not None:
            self._check_no_text()
        elif (self.prompt is None) == (embeds is None):
            got = "neither" if self.prompt is None else "both"
            raise InvalidRequest(f"prompt: expected prompt or prompt_embeds, got {got}: give one of them")
        if embeds is not None and embeds.ndim != 3:
            raise InvalidRequest(
                f"prompt_embeds: expected (videos, tokens, width), got {tuple(embeds.shape)}: "
                "pass one row per video"
            )
        _check_beside("", self.given)
        _check_beside("negative_", self.negative)
        if self.negative_prompt is not None and self.negative.embeds is not None:
            raise InvalidRequest(
                "negative_prompt: expected negative_prompt or negative_prompt_embeds, got both: give one of "
                "them"
            )
        if self.videos_per_prompt < 1:
            raise InvalidRequest(
                f"num_videos_per_prompt: expected at least 1, got {self.videos_per_prompt}: use 1"
            )
        if self.count == 0:
            raise InvalidRequest("prompt: expected at least one prompt, got an empty list: give one")

    def _check_no_text(self) -> None:
        given = (self.prompt, self.negative_prompt, self.given.embeds, self.negative.embeds)
        if any(value is not None for value in given):
            raise InvalidRequest(
                "prompt: expected none for a model that makes its video from a picture alone, got one, or "
                "embeddings: leave it out"
            )

    @property
    def count(self) -> int:
        """Prompts, as texts or as embeddings, or pictures."""
        if self.pictures is not None:
            return self.pictures
        if self.given.embeds is not None:
            return len(self.given.embeds)
        return 1 if isinstance(self.prompt, str) else len(self.prompt or [])

    @property
    def videos(self) -> int:
        """Videos to generate."""
        return self.count * self.videos_per_prompt

    @property
    def has_negative(self) -> bool:
        """Whether the call names something to move away from."""
        return self.negative_prompt is not None or self.negative.embeds is not None

    @property
    def cond(self) -> Prompt:
        """The prompt of the conditional pass."""
        if self.pictures is not None:
            return Prompt(None, self.given, count=self.pictures)
        return Prompt([self.prompt] if isinstance(self.prompt, str) else self.prompt, self.given)

    @property
    def uncond(self) -> Prompt:
        """The unconditional pass's prompt; raises InvalidRequest for a wrong number of negative prompts.

        Without negative embeddings the text is encoded, the empty one if none was given, as in diffusers.
        """
        if self.pictures is not None:
            return self.cond
        if self.negative.embeds is not None:
            return Prompt(None, self.negative, "negative_", self.count)
        negative = self.negative_prompt
        texts = list(negative) if isinstance(negative, list | tuple) else [negative or ""] * self.count
        if len(texts) != self.count:
            raise InvalidRequest(
                f"negative_prompt: expected one text or {self.count}, got {len(texts)}: give one per prompt"
            )
        return Prompt(texts, self.negative, "negative_")


def _check_beside(prefix: str, given: Embeddings) -> None:
    """Masks and pooled embeddings mean nothing without the embeddings that they belong to."""
    for name, tensor in (("prompt_attention_mask", given.mask), (POOLED, given.pooled)):
        if given.embeds is None and tensor is not None:
            raise InvalidRequest(
                f"{prefix}{name}: expected it beside {prefix}prompt_embeds, got it beside a text: give "
                f"{prefix}prompt_embeds too, or leave it out"
            )


def _check_pads_left(name: str, mask: Tensor) -> None:
    """Raises InvalidRequest for padding after a real token."""
    if (mask.int().diff(dim=1) < 0).any():
        raise InvalidRequest(
            f"{name}: expected padding before the real tokens, as this model's tokenizer pads, got some "
            "after them: pad on the left"
        )


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
