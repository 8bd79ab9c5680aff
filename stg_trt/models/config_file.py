"""The JSON files of a checkpoint, whose mistakes are the user's to hear of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stg_trt.errors import InvalidRequest


class ConfigFile(dict[str, Any]):
    """A configuration file; a missing entry is an error for the user."""

    path = Path()

    def __missing__(self, key: str) -> Any:
        raise InvalidRequest(
            f"checkpoint: expected {key} in {self.path}, got no such entry: download the checkpoint again"
        )


def read_config(path: Path) -> ConfigFile:
    """A JSON object; raises InvalidRequest if the file is not there or holds anything else."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InvalidRequest(
            f"checkpoint: expected a diffusers folder with {path.parent.name}/{path.name}, got none in "
            f"{path.parent.parent}: give the folder that holds transformer/ and scheduler/"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"checkpoint: expected JSON in {path}, got {error}: download the checkpoint again"
        ) from error
    if not isinstance(data, dict):
        raise InvalidRequest(
            f"checkpoint: expected an object in {path}, got {type(data).__name__}: correct it"
        )
    config = ConfigFile(data)
    config.path = path
    return config


def read_optional_config(path: Path) -> ConfigFile | None:
    """The same; None if there is no such file."""
    return read_config(path) if path.exists() else None


def positive_integer(value: Any, name: str, file: str) -> int:
    """An entry of a configuration file; raises InvalidRequest if it is no positive integer."""
    if type(value) is not int or value < 1:
        raise InvalidRequest(
            f"checkpoint: expected {name} in {file} as a positive integer, got {value!r}: "
            "download the checkpoint again"
        )
    return value
