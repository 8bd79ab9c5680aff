"""Where the parts of a checkpoint lie: a folder in diffusers' layout, the hub or its cache, a single file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stg_trt.errors import InvalidRequest
from stg_trt.models.families import check_weight_names
from stg_trt.models.hub import HubRepository, cached_name, cached_snapshot, is_cache
from stg_trt.models.single_file import SUFFIXES, SingleFile
from stg_trt.models.weights import STEMS, StoredWeights, variants

_CONFIGURATIONS = (
    "model_index.json",
    "*/config.json",
    "*/scheduler_config.json",
    "*/tokenizer_config.json",
    "*.safetensors.index*.json",
)
# All that is no weights: configurations, words, merges, and pieces of sentencepiece.
_SMALL = ("*.json", "*.txt", "*.model")


@dataclass(frozen=True)
class Source:
    """A folder with a folder per part; `variant` is the word in the names of weight files to prefer.

    The folder of a repository on the hub fills up as parts are asked for. `file` holds the transformer if it
    is in one file of another layout; the other parts are those of the folder.
    """

    name: str
    folder: Path
    variant: str | None = None
    repository: HubRepository | None = None
    file: SingleFile | None = None

    @classmethod
    def open(
        cls, checkpoint: str | Path, variant: str | None, revision: str | None, others: Iterable[str]
    ) -> Source:
        """Finds the folder; `others` are what else a checkpoint may be called, for the message.

        Raises InvalidRequest if there is none, or if no part has weights of the variant.
        """
        source = _found(checkpoint, variant, revision, others)
        source._check_variant()
        return source

    @property
    def denoiser(self) -> str:
        """The part that is called in every step: transformer, or unet."""
        return "unet" if (self.folder / "unet" / "config.json").is_file() else "transformer"

    def has(self, part: str) -> bool:
        """Whether a part's folder is there; of a repository, all but its weights is then downloaded."""
        if self.repository is not None:
            self.repository.fetch([f"{part}/{pattern}" for pattern in _SMALL])
        return (self.folder / part).is_dir()

    def part(self, name: str) -> Path:
        """A part's folder without its weights; raises InvalidRequest if it is not there."""
        if not self.has(name):
            raise InvalidRequest(
                f"checkpoint: expected {name}/ in {self.folder}, got no such folder: download the whole "
                "checkpoint, or leave out what needs it: prompts need the text encoder, frames the VAE"
            )
        return self.folder / name

    def weights(self, part: str) -> StoredWeights:
        """A part's weight files; raises InvalidRequest if it has none that can be read."""
        folder = self.part(part)
        for variant in dict.fromkeys((self.variant, None)):
            if self.repository is not None:
                self.repository.fetch([f"{part}/{name}" for name in _weight_names(variant)])
            if (found := StoredWeights.of_variant(folder, variant)) is not None:
                return found
        raise StoredWeights.missing(folder)

    def transformer_files(self, part: str = "transformer") -> tuple[Path, ...]:
        """The files that hold a transformer's weights."""
        return self.weights(part).files if self.file is None else (self.file.path,)

    def check_transformer(self, part: str = "transformer") -> None:
        """Reads the headers of these files; raises InvalidRequest if one is not whole or not plain."""
        if self.file is None:
            self.weights(part).shapes()
        else:
            self.file.stored_shapes()

    def _check_variant(self) -> None:
        if self.variant is None:
            return
        if self.repository is not None:
            words = self.repository.variants()
        else:
            parts = (part for part in self.folder.iterdir() if part.is_dir())
            words = sorted(
                {name for part in parts for name in variants(file.name for file in part.iterdir())}
            )
        if self.variant not in words:
            raise InvalidRequest(
                f"variant: expected one that weights of {self.name} have ({', '.join(words) or 'none'}), got "
                f"{self.variant!r}: leave it out for the plain weights"
            )


def _found(
    checkpoint: str | Path, variant: str | None, revision: str | None, others: Iterable[str]
) -> Source:
    folder = Path(checkpoint)
    if folder.is_dir() and is_cache(folder):
        return Source(cached_name(folder), cached_snapshot(folder, revision), variant)
    repository = HubRepository.named(str(checkpoint), revision)
    if revision is not None and (folder.exists() or repository is None):
        raise InvalidRequest(
            f"revision: expected none for {checkpoint}, which is no repository of the hub, got {revision!r}: "
            "leave it out"
        )
    if folder.is_dir():
        _check_loose_files(folder)
        return Source(_folder_name(folder), folder, variant)
    if folder.is_file():
        return _of_file(folder, variant)
    if repository is None:
        raise InvalidRequest(
            f"checkpoint: expected a diffusers folder or one of {', '.join(others)}, "
            f"got {checkpoint}, which is neither: check the path"
        )
    snapshot = repository.fetch(_CONFIGURATIONS)
    return Source(repository.name, snapshot, variant, repository.at(snapshot))


def _check_loose_files(folder: Path) -> None:
    """Says what a folder without a network's part holds, if its files are of one that is known."""
    if not any((folder / part).is_dir() for part in ("transformer", "unet")):
        for path in sorted(folder.glob("*.safetensors")):
            check_weight_names(StoredWeights((path,)).shapes())


def _folder_name(folder: Path) -> str:
    """Its own, or the repository's for a snapshot, which is named after its commit."""
    path = folder.absolute()
    return cached_name(path.parents[1]) if path.parent.name == "snapshots" else path.name


def _of_file(path: Path, variant: str | None) -> Source:
    """A transformer's file with the parts of the folder around it, else those that diffusers uses for it."""
    if path.suffix not in SUFFIXES:
        raise InvalidRequest(
            f"checkpoint: expected a folder or a file ending in {' or '.join(SUFFIXES)}, got {path}: give one"
        )
    file = SingleFile(path)
    for folder in (path.parent, path.parent.parent):
        if (folder / "transformer" / "config.json").is_file():
            return Source(path.stem, folder, variant, file=file)
    repository = HubRepository(file.configuration())
    snapshot = repository.fetch(_CONFIGURATIONS)
    return Source(path.stem, snapshot, variant, repository.at(snapshot), file)


def _weight_names(variant: str | None) -> list[str]:
    """Names of weight files with a variant, whole and in shards, and of those without."""
    word = "" if variant is None else f".{variant}"
    shapes = (f"{word}.safetensors", f"{word}-*-of-*.safetensors", f"-*-of-*{word}.safetensors")
    return [f"{stem}{shape}" for stem in STEMS for shape in shapes]
