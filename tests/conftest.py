"""Engines that several tests share, built once per run from real checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stg_trt.build_engines import build

GOLDENS = Path(__file__).parent / "goldens"
LTX_SIZES: dict[str, Any] = {"height": 128, "width": 160, "num_frames": 17, "text_length": 9}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch finds none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def ltx_checkpoint() -> Path:
    """The tiny LTX-Video model of the goldens: 5 blocks, 60 tokens, no text encoder."""
    return GOLDENS / "ltx"


@pytest.fixture(scope="session")
def ltx_engines(tmp_path_factory: pytest.TempPathFactory, ltx_checkpoint: Path) -> Path:
    """Segmented stg-a engines that can perturb blocks 1 and 3, and both twins of block 3; 2 videos."""
    return build_ltx(ltx_checkpoint, tmp_path_factory.mktemp("ltx-engines"))


@pytest.fixture(scope="session")
def inductor_engines(tmp_path_factory: pytest.TempPathFactory, ltx_checkpoint: Path) -> Path:
    """The same engines, compiled by inductor for the CPU."""
    root = tmp_path_factory.mktemp("inductor-engines")
    return build_ltx(ltx_checkpoint, root, backend="inductor", target="cpu")


def build_ltx(checkpoint: Path, root: Path, **options: Any) -> Path:
    """All the layouts that the goldens need, for two videos."""
    shared = {**LTX_SIZES, "max_batch": 2, **options}
    build(checkpoint, root, **shared, stg_blocks=[1, 3], stg_mode="stg-a")
    for mode in ("stg-a", "stg-r"):
        build(checkpoint, root, **shared, stg_blocks=[3], stg_mode=mode, layout="twin")
    return root


@pytest.fixture(scope="session")
def embeds(tmp_path_factory: pytest.TempPathFactory, ltx_checkpoint: Path) -> Path:
    """Embeddings and latents that the tiny engines take, as `generate --embeds` reads them."""
    tensors = load_file(ltx_checkpoint / "cfg.safetensors")
    path = tmp_path_factory.mktemp("embeds") / "embeds.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if "expected" not in name}, path)
    return path
