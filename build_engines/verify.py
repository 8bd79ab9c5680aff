"""The numerics gate: what the engines compute against eager float32."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from stg_trt.engines.manifest import Verification
from stg_trt.errors import GateMissed

from .compiler import FLOAT32, Run, Tolerance


def verify(
    name: str,
    run: Run,
    timesteps: list[float],
    inputs: list[dict[str, Tensor]],
    expected: list[dict[str, Tensor]],
    tolerance: Tolerance = FLOAT32,
) -> tuple[Verification, ...]:
    """Compares all outputs at each timestep; raises GateMissed, naming the segment, where they differ."""
    results = []
    for timestep, feed, wanted in zip(timesteps, inputs, expected, strict=True):
        got = run(feed)
        worst = max(
            (_compare(timestep, want, have) for want, have in zip(wanted.values(), got, strict=True)),
            # NaN compares as false with everything: it is the worst, wherever it is.
            key=lambda found: found.relative_l2 if math.isfinite(found.relative_l2) else math.inf,
        )
        if not (worst.relative_l2 <= tolerance.relative_l2 and worst.cosine >= tolerance.cosine):
            raise GateMissed(
                f"{name}: numerics: expected relative L2 <= {tolerance.relative_l2} against eager float32, "
                f"got {worst.relative_l2:.2e} (cosine {worst.cosine:.6f}) at timestep {timestep}: the export "
                "of this segment is wrong"
            )
        results.append(worst)
    return tuple(results)


def _compare(timestep: float, wanted: Tensor, got: Tensor) -> Verification:
    a, b = (tensor.double().numpy().ravel() for tensor in (wanted, got))
    norm = float(np.linalg.norm(a)) or 1.0
    cosine = float(a @ b) / (norm * (float(np.linalg.norm(b)) or 1.0))
    return Verification(
        timestep=timestep,
        cosine=cosine,
        relative_l2=float(np.linalg.norm(a - b)) / norm,
        max_abs=float(np.abs(a - b).max()),
    )
