"""Where the parts of a checkpoint lie: a folder in diffusers' layout, or a folder of the hub's cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stg_trt.errors import InvalidRequest
from stg_trt.models.weights import StoredWeights, variants


@dataclass(frozen=True)
class Source:
    """A folder with a folder per part; `variant` is the word in the names of weight files to prefer."""

    name: str
    folder: Path
    variant: str | None = None

    @classmethod
    def open(cls, checkpoint: str | Path, variant: str | None, others: Iterable[str]) -> Source:
        """Finds the folder; `others` are what else a checkpoint may be called, for the message.

        Raises InvalidRequest if there is none, or if no part has weights of the variant.
        """
        folder = Path(checkpoint)
        if not folder.is_dir():
            raise InvalidRequest(
                f"checkpoint: expected a diffusers folder or one of {', '.join(others)}, "
                f"got {checkpoint}, which is neither: check the path"
            )
        source = cls(folder.name, folder, variant)
        source._check_variant()
        return source

    def has(self, part: str) -> bool:
        """Whether a part's folder is there."""
        return (self.folder / part).is_dir()

    def part(self, name: str) -> Path:
        """A part's folder; raises InvalidRequest if it is not there."""
        if not self.has(name):
            raise InvalidRequest(
                f"checkpoint: expected {name}/ in {self.folder}, got no such folder: download the whole "
                "checkpoint, or leave out what needs it: prompts need the text encoder, frames the VAE"
            )
        return self.folder / name

    def weights(self, part: str) -> StoredWeights:
        """A part's weight files; raises InvalidRequest if it has none that can be read."""
        return StoredWeights.find(self.part(part), self.variant)

    def _check_variant(self) -> None:
        if self.variant is None:
            return
        found = sorted({name for part in self.folder.iterdir() if part.is_dir() for name in variants(part)})
        if self.variant not in found:
            raise InvalidRequest(
                f"variant: expected one that weights of {self.name} have ({', '.join(found) or 'none'}), got "
                f"{self.variant!r}: leave it out for the plain weights"
            )
