"""A prompt as the engines take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextCondition:
    """Prompt embeddings (videos, tokens, width) and mask (videos, tokens), 1 for a real token.

    If the family takes them, also `pooled` embeddings (videos, width) and the embedded `guidance` (videos,),
    of which None is the family's default.
    """

    embeds: Tensor
    mask: Tensor
    pooled: Tensor | None = None
    guidance: Tensor | None = None

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
        )

    def repeated(self, times: int) -> TextCondition:
        """Every video `times` times, next to each other."""
        return TextCondition(
            self.embeds.repeat_interleave(times, 0),
            self.mask.repeat_interleave(times, 0),
            None if self.pooled is None else self.pooled.repeat_interleave(times, 0),
            None if self.guidance is None else self.guidance.repeat_interleave(times, 0),
        )

    def guided(self, embedded_guidance: float | None) -> TextCondition:
        """The same with an embedded guidance; None is the family's default."""
        if embedded_guidance is None:
            return self
        return replace(self, guidance=torch.full((len(self.embeds),), embedded_guidance))


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """None if no condition has the tensor; either all have it or none."""
    given = [tensor for tensor in tensors if tensor is not None]
    assert len(given) in (0, len(tensors))
    return torch.cat(given) if given else None
