"""A compiled segment behind one small protocol, whatever compiled it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Context(Protocol):
    """One place to run an engine: buffers are bound once, then it is enqueued again and again."""

    def bind(self, name: str, tensor: Tensor) -> None:
        """Gives an input or output its memory and its shape; the tensor must stay alive."""

    def enqueue(self, stream: int) -> None:
        """Runs on the bound buffers, in the order of a CUDA stream (0 on the CPU)."""


class Engine(Protocol):
    """A loaded engine; contexts of one engine share its weights. `alignment` is that of bound addresses."""

    alignment: int

    def context(self) -> Context:
        """A new context with nothing bound."""
