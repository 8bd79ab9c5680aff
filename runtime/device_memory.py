"""What a run needs of the device's memory, said when it is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stg_trt.engines.manifest import Manifest
from stg_trt.errors import OutOfDeviceMemory
from stg_trt.system.units import GIB


@contextmanager
def explain_memory(manifest: Manifest, place: str, less: str) -> Iterator[None]:
    """Re-raises CUDA OOM with the build's memory needs and, as `less`, ways to reduce them."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        activation_bytes = max(record.activation_bytes or 0 for record in manifest.segments)
        raise OutOfDeviceMemory(
            f"{place}: expected room for engines of {manifest.engine_bytes / GIB:.1f} GiB, activations of "
            f"{activation_bytes / GIB:.1f} GiB, the text encoder and the VAE ({manifest.workload}, "
            f"{manifest.layout}), got {str(error).splitlines()[0]} use {less}"
        ) from error
