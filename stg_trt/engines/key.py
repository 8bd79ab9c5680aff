"""Every fact that would make an engine wrong elsewhere, as one key."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stg_trt.models import families
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import TensorSpec
from stg_trt.system.gpu import GpuIdentity

KEY_VERSION = 2


@dataclass(frozen=True)
class EngineKey:
    """All that one engine is made from; a profile is its rows (min, opt, max), `gpu` that of `this-gpu`."""

    weights: str
    code: str
    segment: Segment
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[tuple[int, int, int], ...]
    precision: str
    opset: int | None
    backend: str
    backend_version: str
    target: str
    gpu: GpuIdentity | None
    flags: tuple[str, ...]
    version: int = KEY_VERSION

    def facts(self) -> dict[str, Any]:
        """All facts, as JSON stores them."""
        facts: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return facts


def digest(facts: dict[str, Any]) -> str:
    """SHA-256 of facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@cache
def code_version(*folders: Path) -> str:
    """SHA-256 over the sources that decide what is exported: the families and the build program."""
    hashed = hashlib.sha256()
    for folder in (Path(families.__file__).parent, *folders):
        for path in sorted(folder.glob("*.py")):
            hashed.update(path.name.encode() + path.read_bytes())
    return hashed.hexdigest()[:16]
