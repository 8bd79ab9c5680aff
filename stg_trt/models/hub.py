"""Checkpoints on the Hugging Face hub, through its cache: only the files that are needed, of one commit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stg_trt.errors import InvalidRequest
from stg_trt.models.weights import variants

_HUB = "https://huggingface.co/"
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")


@dataclass(frozen=True)
class HubRepository:
    """`owner/name`, at a branch, a tag or a commit; None is the main branch."""

    name: str
    revision: str | None = None

    @classmethod
    def named(cls, text: str, revision: str | None) -> HubRepository | None:
        """The repository that a text names, as an id or an address; None if it is neither."""
        name = text.removeprefix(_HUB).rstrip("/")
        return cls(name, revision) if _NAME.fullmatch(name) else None

    def at(self, snapshot: Path) -> HubRepository:
        """The same at the commit of a snapshot folder, so that a moving branch cannot mix two."""
        return replace(self, revision=snapshot.name)

    def fetch(self, patterns: Sequence[str]) -> Path:
        """The snapshot folder with all files that fit `patterns`, downloaded unless the cache has them.

        Without a network, or with HF_HUB_OFFLINE, the cache alone is used. Raises InvalidRequest if the
        repository, the revision or, without a network, a file is not there.
        """
        from huggingface_hub import errors, snapshot_download

        try:
            return Path(snapshot_download(self.name, revision=self.revision, allow_patterns=[*patterns]))
        except errors.GatedRepoError as error:
            raise InvalidRequest(
                f"checkpoint: expected a repository of the hub that you may read, got {self.name}, which is "
                f"gated: accept its terms at {_HUB}{self.name} and run hf auth login"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise InvalidRequest(
                f"revision: expected a branch, tag or commit of {self.name}, got {self.revision!r}: leave it "
                "out for the main branch"
            ) from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise InvalidRequest(
                f"checkpoint: expected a folder or a repository of the hub, got {self.name}, which is "
                "neither: check the name, or run hf auth login if it is private"
            ) from error
        except errors.LocalEntryNotFoundError as error:
            raise InvalidRequest(
                f"checkpoint: expected {self.name} on the hub or whole in its cache, got no connection and "
                "no such files in the cache: download it once, or give a folder"
            ) from error
        except errors.HfHubHTTPError as error:
            raise InvalidRequest(
                f"checkpoint: expected {self.name} from the hub, got {str(error).splitlines()[0]}: try again"
            ) from error

    def variants(self) -> list[str]:
        """The words in the names of its weight files; of those that are in the cache without a network."""
        from huggingface_hub import HfApi

        try:
            names = HfApi().list_repo_files(self.name, revision=self.revision)
        # Which exceptions say that there is no network depends on the HTTP library of the hub's version.
        except Exception:
            names = [path.name for path in _files(self.fetch(["model_index.json"]))]
        return variants(Path(name).name for name in names)


def is_cache(folder: Path) -> bool:
    """Whether a folder is what the hub's cache keeps of a repository, such as models--owner--name."""
    return (folder / "snapshots").is_dir()


def cached_name(folder: Path) -> str:
    """The repository's name."""
    named = _CACHED.fullmatch(folder.resolve().name)
    return f"{named['owner']}/{named['name']}" if named else folder.name


def cached_snapshot(folder: Path, revision: str | None) -> Path:
    """The snapshot of a revision in a folder of the cache; the main branch's, or the only one, for None.

    Raises InvalidRequest if it is not there.
    """
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text("utf-8").strip() if reference.is_file() else revision
    found = [path for path in snapshots if commit in (None, path.name)]
    if len(found) != 1:
        refs = sorted(path.relative_to(folder / "refs").as_posix() for path in _files(folder / "refs"))
        known = ", ".join([*refs, *(path.name for path in snapshots)]) or "none"
        raise InvalidRequest(
            f"revision: expected one that {folder} has ({known}), got {revision!r}: give one of them, or "
            "download it"
        )
    return found[0]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
