"""Every fact that would make an engine wrong elsewhere, as one key."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from stg_trt.models.families.base import ModelFamily
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import TensorSpec
from stg_trt.system.gpu import GpuIdentity

# Raised when what all families share makes other engines: the export, its precisions, the compilers. Each has
# a number of its own too; tests/build_engines/test_export_version.py compares both with the graphs.
SHARED_EXPORT_VERSION = 2

_RARE = ("stg_r_inside", "indexed_before", "expert")


@dataclass(frozen=True)
class EngineKey:
    """All that one engine is made from; a profile is its rows (min, opt, max), `gpu` that of `this-gpu`.

    `float8` is a digest of the scales of its FP8 layers; empty if it has none.
    """

    weights: str
    export_version: str
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
    float8: str = ""

    def facts(self) -> dict[str, Any]:
        """All facts, as JSON stores them."""
        facts: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        # What most segments have none of is a fact only where it is one: so older keys stay as they are.
        for name in _RARE:
            if not facts["segment"][name]:
                del facts["segment"][name]
        if not self.float8:
            del facts["float8"]
        return facts


def digest(facts: dict[str, Any]) -> str:
    """SHA-256 of facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def export_version(family: ModelFamily) -> str:
    """Of the code that makes a family's engines; another number is another graph."""
    return f"{SHARED_EXPORT_VERSION}.{family.export_version}"
