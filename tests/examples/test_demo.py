"""The demo's sheet, the evaluation behind its figures, and what `make demo` installs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from examples.moving_shapes.demo import Run, footer, load_measures, notes
from examples.moving_shapes.report import picture_table, table
from examples.moving_shapes.results import (
    CHECKPOINT,
    EVALUATION,
    HERE,
    PICTURES,
    VAE_WEIGHTS,
    load_evaluation,
    sha256_of,
)
from examples.moving_shapes.settings import SHOWN, SWEEP, Setting
from examples.moving_shapes.sheet import Column, Row, draw_sheet

ROOT = Path(__file__).parents[2]
REPORTS: dict[Path, tuple[Setting, ...]] = {
    EVALUATION: SHOWN,
    PICTURES: SHOWN,
    HERE / "sweep.json": SWEEP,
}


def read(path: Path) -> dict[str, Any]:
    """A committed report."""
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return report


@pytest.mark.parametrize(
    ("setting", "name", "passes"),
    [
        (Setting(), "no guidance", ("cond",)),
        (Setting(cfg_scale=3), "CFG 3", ("uncond", "cond")),
        (Setting(stg_scale=1, stg_mode="stg-r"), "STG-R 1, block 2", ("cond", "skip")),
        (Setting(1.5, 1.0, "stg-a", 2), "CFG 1.5 + STG-A 1, block 2", ("uncond", "cond", "skip")),
    ],
)
def test_settings_say_what_a_step_computes(setting: Setting, name: str, passes: tuple[str, ...]) -> None:
    assert (setting.name, tuple(map(str, setting.passes))) == (name, passes)


@pytest.mark.parametrize(("path", "settings"), REPORTS.items(), ids=lambda value: getattr(value, "stem", ""))
def test_committed_reports_are_of_the_committed_checkpoint(path: Path, settings: tuple[Setting, ...]) -> None:
    report = read(path)
    assert report["checkpoint_sha256"] == sha256_of(CHECKPOINT, vae_encoder=path == PICTURES)
    assert [row["name"] for row in report["results"]] == [setting.name for setting in settings]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_the_readme_has_the_reports_table(path: Path) -> None:
    made = (picture_table if path == PICTURES else table)(read(path))
    assert made.rstrip("\n") in (HERE / "README.md").read_text("utf-8")


def test_clips_begin_with_their_pictures() -> None:
    """Within two of 255 levels of what the VAE alone makes of a picture, in the worst clip."""
    assert all(row["first_frame_error"] <= 2 for row in read(PICTURES)["results"])


def test_the_shared_prefix_saves_the_blocks_before_the_perturbed_one() -> None:
    """The passes of CFG and STG add up: each costs the same with and without the other."""
    none, stg, cfg, both = (row["passes_per_step"] for row in read(EVALUATION)["results"])
    assert (none, cfg) == (1, 2)
    assert both - cfg == pytest.approx(stg - none)
    # Blocks 2 to 7 of 8, and the end of the network.
    assert 6 / 8 - 0.01 <= stg - none < 7 / 8


def test_clips_of_prompts_do_not_depend_on_the_vae_encoder(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    digests = []
    for encoder, decoder in ((0, 0), (1, 0), (1, 1)):
        tensors = {"decoder.w": np.array([decoder]), "encoder.w": np.array([encoder])}
        save_file(tensors, tmp_path / VAE_WEIGHTS)
        digests.append((sha256_of(tmp_path), sha256_of(tmp_path, vae_encoder=False)))
    (whole, first), (other_encoder, same), (_, other_decoder) = digests
    assert (first == same, first == other_decoder, whole == other_encoder) == (True, False, False)


def test_another_checkpoint_has_no_figures(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert load_evaluation(tmp_path) is None
    assert load_measures(tmp_path) == {}
    run = Run(Setting(), passes=1.0, step_ms=[3.0, 5.0])
    assert notes(run, {}) == ("1.00 passes, 4 ms per step",)
    assert "another checkpoint" in footer({})[-1]


def test_a_column_shows_its_own_figures() -> None:
    measures = load_measures(CHECKPOINT)
    for number, setting in enumerate(SHOWN):
        picture, prompt = (measures[made_of]["results"][number] for made_of in ("picture", "prompt"))
        cost, *lines = notes(Run(setting, prompt["passes_per_step"], step_ms=[2.0]), measures)
        assert cost == f"{prompt['passes_per_step']:.2f} passes, 2 ms per step"
        assert lines == [
            f"picture: {100 * picture['all']:.0f} % right, overlap {picture['overlap']:.3f}",
            f"prompt: {100 * prompt['all']:.0f} % right, overlap {prompt['overlap']:.3f}",
        ]


def test_the_sheet_shows_the_picture_and_the_first_and_the_last_frame() -> None:
    red, green, blue = np.eye(3)
    clip = np.ones((3, 8, 8, 3)) * np.stack([red, green, blue])[:, None, None]
    rows = [Row("of a picture", clip[1]), Row("of the prompt alone")]
    sheet = np.asarray(draw_sheet(rows, [Column("title", ("note",), (clip, clip))] * 2, ["footer"]))
    # 8 pixels, drawn twice as large, in two rows and two columns; the picture is there once.
    drawn = [int((sheet == (255 * colour)).all(-1).sum()) for colour in (red, green, blue)]
    assert drawn == [4 * 16 * 16, 16 * 16, 4 * 16 * 16]


def test_the_demo_needs_no_tools_for_development(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("examples.moving_shapes.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    importlib.import_module("examples.moving_shapes.demo")
    with pytest.raises(ImportError):
        importlib.import_module("examples.moving_shapes.report")


@pytest.mark.parametrize(("goal", "tools"), [("demo", False), ("test", True)])
def test_make_installs_what_the_goal_needs(goal: str, tools: bool, tmp_path: Path) -> None:
    planned = subprocess.run(
        ["make", "--dry-run", goal, f"VENV={tmp_path}"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert "--editable ." in planned
    assert (".[dev]" in planned) == tools
