"""Engines of the goldens' checkpoints, for two videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stg_trt import build
from stg_trt.models.segment import LAYOUTS
from tests.support.family_cases import FamilyCase
from tests.support.family_cases.case import GOLDENS
from tests.support.tiny_svd import SVD

_FOR_TWO: dict[str, Any] = {"max_batch": 2, "verify_timesteps": 1}

LTX2 = {"2.0": GOLDENS / "ltx2", "2.3": GOLDENS / "ltx2_3"}
LTX2_SIZES: dict[str, Any] = {"height": 128, "width": 160, "num_frames": 17, "text_length": 8}
LTX2_BLOCK = 3

OPEN_SORA = GOLDENS / "open_sora"
OPEN_SORA_SIZES: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 34, "text_length": 12}

SVD_SIZES: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 4}
# In the encoder, and in the first attention module of the decoder.
SVD_BLOCKS = {"spatial": [0, 4], "temporal": [5]}


def build_goldens(case: FamilyCase, root: Path, **options: Any) -> Path:
    """All the layouts that a family's goldens need."""
    shared = {**case.sizes, "max_batch": 2, **options}
    build(case.goldens, root, **shared, stg_blocks=case.cut_at, stg_mode="stg-a")
    for mode, blocks in case.twins:
        build(case.goldens, root, **shared, stg_blocks=blocks, stg_mode=mode, layout="twin")
    return root


def build_ltx2(root: Path) -> None:
    """Both versions in both layouts, in a folder for each version."""
    for version, checkpoint in LTX2.items():
        for layout in LAYOUTS:
            build(
                checkpoint, root / version, **LTX2_SIZES, **_FOR_TWO, stg_blocks=[LTX2_BLOCK], layout=layout
            )


def build_open_sora(root: Path) -> None:
    """Every block that the goldens skip, and a twin of either mode."""
    shared = {**OPEN_SORA_SIZES, **_FOR_TWO}
    build(OPEN_SORA, root, **shared, stg_blocks=[2, 3, 4, 5], stg_mode="stg-a")
    build(OPEN_SORA, root, **shared, stg_blocks=[2, 3], stg_mode="stg-a", layout="twin")
    build(OPEN_SORA, root, **shared, stg_blocks=[4, 5], stg_mode="stg-r", layout="twin")


def build_svd(root: Path) -> None:
    """Segmented with a pass for each kind of attention, and a twin."""
    build(SVD, root, **SVD_SIZES, **_FOR_TWO, stg_blocks=SVD_BLOCKS)
    build(SVD, root, **SVD_SIZES, **_FOR_TWO, stg_blocks=[5], stg_mode="stg-r", layout="twin")
