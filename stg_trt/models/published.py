"""Configurations of published models, which ship with the package without weights."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def published() -> tuple[str, ...]:
    """Their names."""
    entries = (resources.files("stg_trt") / "published").iterdir()
    return tuple(sorted(e.name.removesuffix(".json") for e in entries if e.name.endswith(".json")))


def published_data(name: str) -> dict[str, Any]:
    """The configurations of a model's parts, by their names."""
    file = resources.files("stg_trt") / "published" / f"{name}.json"
    data: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return data
