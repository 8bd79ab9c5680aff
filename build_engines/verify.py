"""The numerics gate: what the engines compute against eager float32."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict

import numpy as np
from torch import Tensor

from stg_trt.engines.manifest import Verification
from stg_trt.errors import GateMissed

from .compiler import FLOAT32, Distance, Run, Tolerance


def verify(
    name: str,
    run: Run,
    timesteps: list[float],
    inputs: list[dict[str, Tensor]],
    expected: list[dict[str, Tensor]],
    tolerance: Tolerance = FLOAT32,
) -> tuple[Verification, ...]:
    """Compares all outputs at each timestep; raises GateMissed, naming segment and piece, if they differ."""
    results = []
    for timestep, feed, wanted in zip(timesteps, inputs, expected, strict=True):
        found = distance(wanted.values(), run(feed))
        if not tolerance.allows(found):
            raise GateMissed(
                f"{name}: numerics: expected relative L2 <= {tolerance.relative_l2} against eager float32, "
                f"got {found.relative_l2:.2e} (cosine {found.cosine:.6f}) at timestep {timestep}: the export "
                "of this segment is wrong"
            )
        results.append(Verification(timestep=timestep, **asdict(found)))
    return tuple(results)


def worst(checks: Mapping[str, tuple[Verification, ...]]) -> tuple[Verification, ...]:
    """Of a segment's pieces by name: at each timestep, that of the one which is farthest away."""
    named = [[check.model_copy(update={"piece": piece}) for check in checks[piece]] for piece in checks]
    return tuple(
        max(at_timestep, key=lambda found: found.relative_l2) for at_timestep in zip(*named, strict=True)
    )


def distance(wanted: Iterable[Tensor], got: Iterable[Tensor]) -> Distance:
    """The largest distance of some outputs from the expected ones."""
    return max(
        (_distance(want, have) for want, have in zip(wanted, got, strict=True)),
        # NaN compares as false with everything: it is the worst, wherever it is.
        key=lambda found: found.relative_l2 if math.isfinite(found.relative_l2) else math.inf,
    )


def _distance(wanted: Tensor, got: Tensor) -> Distance:
    a, b = (tensor.double().numpy().ravel() for tensor in (wanted, got))
    norm = float(np.linalg.norm(a)) or 1.0
    return Distance(
        cosine=float(a @ b) / (norm * (float(np.linalg.norm(b)) or 1.0)),
        relative_l2=float(np.linalg.norm(a - b)) / norm,
        max_abs=float(np.abs(a - b).max()),
    )
