"""A build with other weights: beside a finished one of the same model, whose graphs it takes, and alone."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stg_trt.build_engines.build import build
from stg_trt.engines.manifest import load
from stg_trt.errors import GateMissed
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.random_weights import random_weights
from stg_trt.system.files import file_sha256

from . import record

_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class RebuildBenchmark:
    """Each build runs in a process of its own, so that no graph is in its memory; imports are not timed."""

    checkpoint: str
    height: int
    width: int
    num_frames: int
    text_length: int | None
    blocks: tuple[int, ...] | None
    stg_blocks: tuple[int, ...] | None
    backend: str
    target: str | None
    verify_timesteps: int
    rounds: int

    def run(self, output: Path) -> None:
        """Builds by turns beside the first one and alone; writes the JSON after each round."""
        blocks = None if self.blocks is None else list(self.blocks)
        results = record.Record(output, "rebuild", model=self.checkpoint, blocks=blocks, rounds=[])
        model = Checkpoint.open(self.checkpoint, random_weights=True).shortened(self.blocks)
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            first, other = (write_checkpoint(model, root / name) for name in ("first", "other"))
            results.add(first=self._build(first, root / "engines")[1])
            for _ in range(self.rounds):
                folder, beside = self._build(other, root / "engines")
                fresh, alone = self._build(other, root / "alone")
                _check_equal(folder, fresh)
                results.result["rounds"].append({"beside": beside, "alone": alone})
                results.add()
                print(f"beside {beside['wall_s']:.1f} s, alone {alone['wall_s']:.1f} s")
                shutil.rmtree(folder)
                shutil.rmtree(root / "alone")
        results.finish()

    def _build(self, checkpoint: Path, engines: Path) -> tuple[Path, dict[str, Any]]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(_timed_build, self, checkpoint, engines).result()


def write_checkpoint(model: Checkpoint, folder: Path) -> Path:
    """Random weights in bfloat16, other ones for each name of a folder, of a model with one transformer."""
    family = model.family
    (part,) = family.transformers
    for name, config in ((part, model.transformer_config), ("scheduler", model.scheduler_config)):
        (folder / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(config))
    for name, found in (("vae", model.vae_config), ("image_encoder", model.image_encoder_config)):
        if found is not None:
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(found))
    if model.model_index is not None:
        (folder / "model_index.json").write_text(json.dumps(model.model_index))
    named = model.load_transformer((), ends=False).state_dict()
    blocks: dict[int | None, dict[str, Any]] = defaultdict(dict)
    for name, weight in named.items():
        blocks[family.block_of(name)][name] = weight
    places: dict[str, str] = {}
    for number, weights in enumerate(blocks.values(), start=1):
        shard = _WEIGHTS.replace(".", f"-{number:05}-of-{len(blocks):05}.", 1)
        drawn = random_weights(weights, folder.name)
        save_file({name: weight.to(torch.bfloat16) for name, weight in drawn.items()}, folder / part / shard)
        places |= dict.fromkeys(weights, shard)
    index = {"metadata": {}, "weight_map": places}
    (folder / part / f"{_WEIGHTS}.index.json").write_text(json.dumps(index))
    return folder


def _timed_build(benchmark: RebuildBenchmark, checkpoint: Path, engines: Path) -> tuple[Path, dict[str, Any]]:
    """The folder; seconds of the whole build and of its stages, and the segments whose graphs it took."""
    start = time.perf_counter()
    (folder,) = build(
        checkpoint,
        engines,
        height=benchmark.height,
        width=benchmark.width,
        num_frames=benchmark.num_frames,
        text_length=benchmark.text_length,
        stg_blocks=benchmark.stg_blocks,
        backend=benchmark.backend,
        target=benchmark.target,
        verify_timesteps=benchmark.verify_timesteps,
    )
    wall = time.perf_counter() - start
    segments = load(folder).segments
    stages: dict[str, float] = defaultdict(float)
    for stage, seconds in (item for segment in segments for item in segment.seconds.items()):
        stages[stage] += seconds
    return folder, {
        "wall_s": round(wall, 2),
        "stages_s": {stage: round(seconds, 2) for stage, seconds in stages.items()},
        "engine_bytes": sum(segment.engine_bytes for segment in segments),
        "reused": {segment.segment.name: list(segment.reused) for segment in segments},
    }


def _check_equal(one: Path, other: Path) -> None:
    """Raises GateMissed unless two builds have the same files with the same contents."""
    names = {
        file.name for folder in (one, other) for record in load(folder).segments for file in record.files
    }
    for name in sorted(names):
        if file_sha256(one / name) != file_sha256(other / name):
            raise GateMissed(f"{name}: expected the file of a build alone, got another: report it")
