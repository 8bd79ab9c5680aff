"""The README's picture is what its script draws, of the model that it names."""

from __future__ import annotations

import runpy
from xml.etree import ElementTree

from stg_trt.models.checkpoint import Checkpoint
from tests.support.pages import ROOT, text

SCRIPT = runpy.run_path(str(ROOT / "docs/shared_prefix.py"))


def test_the_committed_picture_is_the_scripts() -> None:
    assert text("docs/shared_prefix.svg") == SCRIPT["drawing"]()


def test_the_picture_is_of_ltx_video_2b() -> None:
    family = Checkpoint.open("ltx-video-2b", random_weights=True).family
    assert (SCRIPT["BLOCKS"], (SCRIPT["PERTURBED"],)) == (family.num_blocks, family.defaults.stg_blocks)


def test_the_picture_shows_the_block_runs_that_it_counts() -> None:
    shapes = [element.get("class") for element in ElementTree.fromstring(SCRIPT["drawing"]()).iter()]
    blocks, perturbed = SCRIPT["BLOCKS"], SCRIPT["PERTURBED"]
    assert shapes.count("computed") + shapes.count("perturbed") == 6 * blocks - perturbed
    assert shapes.count("perturbed") == 2
