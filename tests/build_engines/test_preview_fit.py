"""The map from latents to colours, fitted to real VAEs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stg_trt import VideoPipeline
from stg_trt.build_engines.preview_fit import blobs, fit_preview
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.parts import load_vae_part
from stg_trt.models.workload import Workload
from tests.support.family_cases import FamilyCase

SHAPES = Path(__file__).parents[2] / "examples" / "moving_shapes" / "checkpoint"


def test_colours_of_a_trained_vae_are_linear() -> None:
    """Of clips that it was not fitted to, and of frames that the VAE decodes from their latents."""
    checkpoint = Checkpoint.open(SHAPES)
    vae = load_vae_part(checkpoint, {"default": torch.float32}, workload := sizes(checkpoint)).vae
    fitted = fit_preview(checkpoint, workload)
    assert fitted is not None and fitted.fit > 0.95
    clip = blobs(1, 8 * workload.height // checkpoint.family.latent_shape(workload)[2], generator(1))
    with torch.no_grad():
        latents = vae.encode(clip).latent_dist.mode()
    (shown,) = fitted.frames(latents)[0]
    colours = torch.nn.functional.adaptive_avg_pool2d(clip[0, :, 0], shown.shape[0]).permute(1, 2, 0)
    assert np.abs(shown / 127.5 - 1 - colours.numpy()).mean() < 0.1


def sizes(checkpoint: Checkpoint) -> Workload:
    spatial = checkpoint.family.compression[1]  # type: ignore[attr-defined]
    return Workload(8 * spatial, 8 * spatial, 9, 16, "fp32")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_builds_have_the_map_of_their_vae(case: FamilyCase, pipeline: VideoPipeline) -> None:
    (build, *_) = pipeline.store.builds
    fitted = build.manifest.preview
    assert fitted is not None and len(fitted.weight) == pipeline.family.latent_shape(case.workload)[0]
    assert fit_preview(pipeline.checkpoint, case.workload) == fitted


@pytest.mark.parametrize("broken", ["no VAE", "another VAE"])
def test_engines_do_not_need_a_vae(ltx_checkpoint: Path, tmp_path: Path, broken: str) -> None:
    checkpoint = ltx_checkpoint
    if broken == "another VAE":
        checkpoint = tmp_path / "checkpoint"
        checkpoint.mkdir()
        for part in ltx_checkpoint.iterdir():
            (checkpoint / part.name).symlink_to(part)
        (checkpoint / "vae").mkdir()
        (checkpoint / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLLTXVideo"}')
    opened = Checkpoint.open(checkpoint)
    assert fit_preview(opened, Workload(64, 64, 9, 9, "fp32")) is None
