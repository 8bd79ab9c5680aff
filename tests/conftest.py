"""Engines that several tests share, built once per run from real checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stg_trt.build_engines import build
from tests.cli import keep_one_block
from tests.family_cases import LTX, FamilyCase


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch finds none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def golden_engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[FamilyCase], Path]:
    """Per family: segmented stg-a engines that can perturb `cut_at`, and the twins; 2 videos."""
    built: dict[str, Path] = {}

    def engines(case: FamilyCase) -> Path:
        if str(case) not in built:
            built[str(case)] = build_goldens(case, tmp_path_factory.mktemp(f"{case}-engines"))
        return built[str(case)]

    return engines


@pytest.fixture(scope="session")
def ltx_checkpoint() -> Path:
    """The tiny LTX-Video model of the goldens: 5 blocks, 60 tokens, no text encoder."""
    return LTX.goldens


@pytest.fixture(scope="session")
def ltx_engines(golden_engines: Callable[[FamilyCase], Path]) -> Path:
    """Segmented stg-a engines that can perturb blocks 1 and 3, and both twins of block 3; 2 videos."""
    return golden_engines(LTX)


@pytest.fixture(scope="session")
def inductor_engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same engines, compiled by inductor for the CPU."""
    root = tmp_path_factory.mktemp("inductor-engines")
    return build_goldens(LTX, root, backend="inductor", target="cpu")


def build_goldens(case: FamilyCase, root: Path, **options: Any) -> Path:
    """All the layouts that a family's goldens need, for two videos."""
    shared = {**case.sizes, "max_batch": 2, **options}
    build(case.goldens, root, **shared, stg_blocks=case.cut_at, stg_mode="stg-a")
    for mode, blocks in case.twins:
        build(case.goldens, root, **shared, stg_blocks=blocks, stg_mode=mode, layout="twin")
    return root


@pytest.fixture(scope="session")
def embeds(tmp_path_factory: pytest.TempPathFactory, ltx_checkpoint: Path) -> Path:
    """Embeddings and latents that the tiny engines take, as `generate --embeds` reads them."""
    tensors = load_file(ltx_checkpoint / "cfg.safetensors")
    path = tmp_path_factory.mktemp("embeds") / "embeds.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if "expected" not in name}, path)
    return path


@pytest.fixture(scope="session")
def one_block(tmp_path_factory: pytest.TempPathFactory, ltx_checkpoint: Path) -> Path:
    """The tiny checkpoint with one block."""
    folder = tmp_path_factory.mktemp("one-block")
    for name in ("transformer", "scheduler"):
        shutil.copytree(ltx_checkpoint / name, folder / name)
    keep_one_block(folder)
    return folder
