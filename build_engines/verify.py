"""The numerics gate: a segment's graph in ONNX Runtime against eager float32."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnxruntime as ort
from torch import Tensor

from stg_trt.errors import GateMissed
from stg_trt.manifest import Verification
from stg_trt.segment import engine_outputs

# Float32 against float32: what is left is the order of summation.
MAX_RELATIVE_L2 = 1e-4
MIN_COSINE = 1 - 1e-6


def verify(
    name: str,
    path: Path,
    timesteps: list[float],
    inputs: list[dict[str, Tensor]],
    expected: list[dict[str, Tensor]],
) -> tuple[Verification, ...]:
    """Compares all outputs at each timestep; raises GateMissed, naming the segment, where they differ."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    results = []
    for timestep, feed, wanted in zip(timesteps, inputs, expected, strict=True):
        names = list(engine_outputs(tuple(feed), tuple(wanted)))
        got = session.run(names, {key: value.numpy() for key, value in feed.items()})
        worst = max(
            (_compare(timestep, want.numpy(), have) for want, have in zip(wanted.values(), got, strict=True)),
            # NaN compares as false with everything: it is the worst, wherever it is.
            key=lambda found: found.relative_l2 if math.isfinite(found.relative_l2) else math.inf,
        )
        if not (worst.relative_l2 <= MAX_RELATIVE_L2 and worst.cosine >= MIN_COSINE):
            raise GateMissed(
                f"{name}: numerics: expected relative L2 <= {MAX_RELATIVE_L2} against eager float32, got "
                f"{worst.relative_l2:.2e} (cosine {worst.cosine:.6f}) at timestep {timestep}: the export of "
                "this segment is wrong"
            )
        results.append(worst)
    return tuple(results)


def _compare(timestep: float, wanted: np.ndarray, got: np.ndarray) -> Verification:
    a, b = wanted.astype(np.float64).ravel(), got.astype(np.float64).ravel()
    norm = float(np.linalg.norm(a)) or 1.0
    cosine = float(a @ b) / (norm * (float(np.linalg.norm(b)) or 1.0))
    return Verification(
        timestep=timestep,
        cosine=cosine,
        relative_l2=float(np.linalg.norm(a - b)) / norm,
        max_abs=float(np.abs(a - b).max()),
    )
