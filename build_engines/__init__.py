"""Checkpoint to verified engines: cut, export, verify, compile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import build

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    # The command line imports this package for --help: torch is imported when a build starts.
    if name != "build":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .build import build

    globals()["build"] = build
    return build
