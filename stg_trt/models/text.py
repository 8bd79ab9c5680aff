"""A prompt as the engines take it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextCondition:
    """Prompt embeddings (videos, tokens, width) and mask (videos, tokens), 1 for a real token.

    If the family takes them, also `pooled` embeddings (videos, width), the embedded `guidance` (videos,),
    of which None is the family's default, and what the prompt says to the sound, `audio` (videos, tokens,
    width) under the same mask.
    """

    embeds: Tensor
    mask: Tensor
    pooled: Tensor | None = None
    guidance: Tensor | None = None
    audio: Tensor | None = None

    @classmethod
    def none(cls, videos: int) -> TextCondition:
        """No tokens, for a model that reads no text."""
        return cls(torch.zeros(videos, 0, 0), torch.zeros(videos, 0))

    @classmethod
    def stacked(cls, texts: Sequence[TextCondition]) -> TextCondition:
        """The videos of all, in order."""
        return cls(
            torch.cat([text.embeds for text in texts]),
            torch.cat([text.mask for text in texts]),
            _stacked([text.pooled for text in texts]),
            _stacked([text.guidance for text in texts]),
            _stacked([text.audio for text in texts]),
        )

    def repeated(self, times: int) -> TextCondition:
        """Every video `times` times, next to each other."""
        return self._each(lambda tensor: tensor.repeat_interleave(times, 0))

    def guided(self, embedded_guidance: float | None) -> TextCondition:
        """The same with an embedded guidance; None is the family's default."""
        if embedded_guidance is None:
            return self
        return replace(self, guidance=torch.full((len(self.embeds),), embedded_guidance))

    def to(self, device: Any, dtype: torch.dtype) -> TextCondition:
        """On another device, the embeddings in another dtype."""
        moved = self._each(lambda tensor: tensor.to(device, dtype))
        return replace(moved, mask=self.mask.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> TextCondition:
        tensors = (self.embeds, self.mask, self.pooled, self.guidance, self.audio)
        changed = [None if tensor is None else change(tensor) for tensor in tensors]
        embeds, mask, *rest = changed
        assert embeds is not None and mask is not None
        return TextCondition(embeds, mask, *rest)


@dataclass(frozen=True)
class Connector:
    """A part of a checkpoint between text encoder and transformer, which runs once per prompt.

    A call's prompt_embeds are those before it. `connect` runs the part on them; `width` is theirs, by the
    text encoder's configuration. With `pads_left`, a prompt that is shorter than the others is padded before
    its first token.
    """

    part: str
    connect: Callable[[Any, TextCondition], TextCondition]
    width: Callable[[Any], int]
    pads_left: bool = False


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """None if no condition has the tensor; either all have it or none."""
    given = [tensor for tensor in tensors if tensor is not None]
    assert len(given) in (0, len(tensors))
    return torch.cat(given) if given else None
