"""Video diffusion with Spatiotemporal Skip Guidance (STG) on compiled engines."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stg_trt.build_engines.build import build
    from stg_trt.guidance.bins import TimestepBins
    from stg_trt.guidance.options import GuidanceOptions
    from stg_trt.guidance.tables import Guidance
    from stg_trt.models.perturbation import Perturbation
    from stg_trt.runtime.pipeline import VideoPipeline

__version__ = "0.1.0"
__all__ = [
    "Guidance",
    "GuidanceOptions",
    "Perturbation",
    "TimestepBins",
    "VideoPipeline",
    "__version__",
    "build",
]

_MODULES = {
    "Guidance": "stg_trt.guidance.tables",
    "GuidanceOptions": "stg_trt.guidance.options",
    "Perturbation": "stg_trt.models.perturbation",
    "TimestepBins": "stg_trt.guidance.bins",
    "VideoPipeline": "stg_trt.runtime.pipeline",
    "build": "stg_trt.build_engines.build",
}


def __getattr__(name: str) -> Any:
    # torch and diffusers take seconds to import: `stg-trt --help` must not wait for them.
    if name not in _MODULES:
        raise AttributeError(f"module 'stg_trt' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
