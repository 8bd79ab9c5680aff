"""What a compiler hands back for one segment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Compiled:
    """Finished files in the work folder, and what the gates measured."""

    files: tuple[Path, ...]
    fused_attentions: int
    activation_bytes: int | None
