"""The committed evaluations: the checkpoint that they measured, and their rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

HERE = Path(__file__).parent
VAE_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
CHECKPOINT = HERE / "checkpoint"
EVALUATION = HERE / "evaluation.json"
PICTURES = HERE / "pictures.json"
"""Of clips made of prompts alone, and of clips that begin with pictures."""


def sha256_of(folder: Path, vae_encoder: bool = True) -> str:
    """SHA-256 over the names and contents of a checkpoint's files, with or without the VAE's encoder.

    Only clips that begin with pictures depend on the encoder.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        digest.update(name.encode())
        if vae_encoder or name != VAE_WEIGHTS:
            digest.update(path.read_bytes())
            continue
        for tensor, values in sorted(load_file(path).items()):
            if not tensor.startswith("encoder."):
                digest.update(tensor.encode() + values.tobytes())
    return digest.hexdigest()


def load_evaluation(checkpoint: Path, path: Path = EVALUATION) -> dict[str, Any] | None:
    """A committed evaluation; None if it measured another checkpoint."""
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    measured = sha256_of(checkpoint, vae_encoder=path == PICTURES)
    return report if report["checkpoint_sha256"] == measured else None
