"""What the engines are told of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextCondition:
    """Prompt embeddings (videos, tokens, width) and mask (videos, tokens), 1 for a real token.

    Where the family takes them, also `pooled` embeddings (videos, width) and the embedded `guidance`
    (videos,), of which None is the family's default.
    """

    embeds: Tensor
    mask: Tensor
    pooled: Tensor | None = None
    guidance: Tensor | None = None

    @classmethod
    def stacked(cls, texts: Sequence[TextCondition]) -> TextCondition:
        """The videos of all, in order."""
        rows: dict[str, Any] = {}
        for field in fields(cls):
            tensors = [getattr(text, field.name) for text in texts]
            rows[field.name] = None if tensors[0] is None else torch.cat(tensors)
        return cls(**rows)

    def repeated(self, times: int) -> TextCondition:
        """Every video `times` times, next to each other."""
        rows: dict[str, Any] = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            rows[field.name] = None if tensor is None else tensor.repeat_interleave(times, 0)
        return TextCondition(**rows)

    def guided(self, embedded_guidance: float | None) -> TextCondition:
        """The same with an embedded guidance; None is the family's default."""
        if embedded_guidance is None:
            return self
        return replace(self, guidance=torch.full((len(self.embeds),), embedded_guidance))
