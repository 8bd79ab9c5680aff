"""The committed evaluation: the checkpoint that it measured, and its rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"
EVALUATION = HERE / "evaluation.json"


def sha256_of(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def load_evaluation(checkpoint: Path) -> dict[str, Any] | None:
    """The committed evaluation; None if it measured another checkpoint."""
    report: dict[str, Any] = json.loads(EVALUATION.read_text("utf-8"))
    return report if report["checkpoint_sha256"] == sha256_of(checkpoint) else None
