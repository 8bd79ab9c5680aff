"""Which checkpoints are served from which folders of engines, and under which names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stg_trt.errors import InvalidRequest

EngineFolders = list[tuple[Path, ...]]


def folders_of(checkpoints: Sequence[str], engines: Sequence[Path]) -> EngineFolders:
    """The engine folders of each checkpoint: one for all, all for one, or one for each."""
    if len(checkpoints) == 1:
        return [tuple(engines)]
    if len(engines) == 1:
        return [(engines[0],)] * len(checkpoints)
    if len(engines) != len(checkpoints):
        raise InvalidRequest(
            f"engines: expected one folder, or one for each of {len(checkpoints)} checkpoints, got "
            f"{len(engines)}: repeat --engines in the order of the checkpoints"
        )
    return [(folder,) for folder in engines]


def names_of(checkpoints: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names of the models, which tell them apart."""
    if names and len(names) != len(checkpoints):
        raise InvalidRequest(
            f"model_name: expected one for each of {len(checkpoints)} checkpoints, got {len(names)}: repeat "
            "--model-name in their order"
        )
    chosen = [*names] or [_usual_name(checkpoint) for checkpoint in checkpoints]
    twice = sorted({name for name in chosen if chosen.count(name) > 1})
    if twice or not all(chosen):
        raise InvalidRequest(
            f"model_name: expected different names, got {(twice or [''])[0]!r} twice: give --model-name for "
            "each checkpoint"
        )
    return chosen


def _usual_name(checkpoint: str) -> str:
    """The last part of a path, or of the id of a repository."""
    path = Path(checkpoint)
    return path.resolve().name if path.is_dir() else path.stem if path.exists() else path.name
