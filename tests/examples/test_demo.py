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

from examples.moving_shapes.demo import Run, footer, notes
from examples.moving_shapes.report import table
from examples.moving_shapes.results import CHECKPOINT, EVALUATION, HERE, load_evaluation, sha256_of
from examples.moving_shapes.settings import SHOWN, SWEEP, Setting
from examples.moving_shapes.sheet import Column, draw_sheet

ROOT = Path(__file__).parents[2]
REPORTS: dict[Path, tuple[Setting, ...]] = {EVALUATION: SHOWN, HERE / "sweep.json": SWEEP}


def read(path: Path) -> dict[str, Any]:
    """A committed report."""
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return report


@pytest.mark.parametrize(
    ("setting", "name", "passes"),
    [
        (Setting(), "no guidance", ("cond",)),
        (Setting(cfg_scale=3), "CFG 3", ("uncond", "cond")),
        (Setting(stg_scale=1, stg_mode="stg-r"), "STG-R 1, block 5", ("cond", "skip")),
        (Setting(1.5, 1.0, "stg-a", 2), "CFG 1.5 + STG-A 1, block 2", ("uncond", "cond", "skip")),
    ],
)
def test_settings_say_what_a_step_computes(setting: Setting, name: str, passes: tuple[str, ...]) -> None:
    assert (setting.name, tuple(map(str, setting.passes))) == (name, passes)


@pytest.mark.parametrize(("path", "settings"), REPORTS.items(), ids=lambda value: getattr(value, "stem", ""))
def test_committed_reports_are_of_the_committed_checkpoint(path: Path, settings: tuple[Setting, ...]) -> None:
    report = read(path)
    assert report["checkpoint_sha256"] == sha256_of(CHECKPOINT)
    assert [row["name"] for row in report["results"]] == [setting.name for setting in settings]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_the_readme_has_the_reports_table(path: Path) -> None:
    assert table(read(path)).rstrip("\n") in (HERE / "README.md").read_text("utf-8")


def test_the_shared_prefix_saves_the_blocks_before_the_perturbed_one() -> None:
    """The passes of CFG and STG add up: each costs the same with and without the other."""
    none, stg, cfg, both = (row["passes_per_step"] for row in read(EVALUATION)["results"])
    assert (none, cfg) == (1, 2)
    assert both - cfg == pytest.approx(stg - none)
    # Blocks 5, 6 and 7 of 8, and the end of the network.
    assert 3 / 8 <= stg - none < 4 / 8


def test_another_checkpoint_has_no_figures(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert load_evaluation(tmp_path) is None
    run = Run(Setting(), passes=1.0, step_ms=[3.0, 5.0])
    assert notes(run, None) == ("1.00 passes, 4 ms per step",)
    assert "another checkpoint" in footer(None)[-1]


def test_a_column_shows_its_own_figures() -> None:
    evaluation = load_evaluation(CHECKPOINT)
    assert evaluation is not None
    for setting, row in zip(SHOWN, evaluation["results"], strict=True):
        cost, quality, prompts = notes(Run(setting, row["passes_per_step"], step_ms=[2.0]), evaluation)
        assert cost == f"{row['passes_per_step']:.2f} passes, 2 ms per step"
        assert quality == f"overlap {row['overlap']:.3f}, jitter {row['jitter']:.2f} px"
        assert prompts.startswith(f"{100 * row['all']:.0f} %")


def test_the_sheet_shows_the_first_and_the_last_frame() -> None:
    red, green, blue = np.eye(3)
    clip = np.ones((3, 8, 8, 3)) * np.stack([red, green, blue])[:, None, None]
    sheet = np.asarray(draw_sheet(["a prompt"], [Column("title", ("note",), (clip,))] * 2, ["footer"]))
    # 8 pixels, drawn twice as large, in two columns.
    drawn = [int((sheet == (255 * colour)).all(-1).sum()) for colour in (red, green, blue)]
    assert drawn == [2 * 16 * 16, 0, 2 * 16 * 16]


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
