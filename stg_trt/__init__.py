"""Video diffusion with Spatiotemporal Skip Guidance (STG) on compiled engines."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stg_trt.guidance import Guidance, TimestepBins
    from stg_trt.perturbation import Perturbation
    from stg_trt.pipeline import VideoPipeline

__version__ = "0.1.0"
__all__ = ["Guidance", "Perturbation", "TimestepBins", "VideoPipeline", "__version__"]

_MODULES = {
    "Guidance": "stg_trt.guidance",
    "Perturbation": "stg_trt.perturbation",
    "TimestepBins": "stg_trt.guidance",
    "VideoPipeline": "stg_trt.pipeline",
}


def __getattr__(name: str) -> Any:
    # torch and diffusers take seconds to import: `stg-trt --help` must not wait for them.
    if name not in _MODULES:
        raise AttributeError(f"module 'stg_trt' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
