"""The commands and the Python of the pages: commands parse, the quick start and every Python snippet run."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main

from stg_trt import VideoPipeline, build
from stg_trt.cli.main import _application
from stg_trt.models.families.wan import Wan
from tests.conftest import BuiltOnce
from tests.support.family_cases import WAN
from tests.support.family_cases.case import Sizes
from tests.support.pages import PAGES, snippets
from tests.support.whole_pipelines import TEXT_LENGTH

# The pages' size becomes that of a small model, and their numbers of steps a few.
SMALL = {"height": 48, "width": 64, "num_frames": 9, "num_inference_steps": 6}
SIZES: Sizes = {
    "height": SMALL["height"],
    "width": SMALL["width"],
    "num_frames": SMALL["num_frames"],
    "text_length": TEXT_LENGTH,
}
BLOCK = 1
COMMANDS = [
    (page, line.split("#")[0].strip())
    for page in PAGES
    for block in snippets(page, "sh")
    for line in block.splitlines()
    if line.startswith("stg-trt ")
]


OTHER_PYTHON_PAGES = [
    page for page in PAGES if snippets(page, "python") and page not in ("README.md", "docs/quickstart.md")
]


def parsed(arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """The command that the arguments name, and its parameters; raises click's errors for wrong ones."""
    command: Any = typer.main.get_command(_application())
    while hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    return command, command.make_context(command.name, arguments).params


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_parse(page: str, command: str) -> None:
    parsed(shlex.split(command)[1:])


def shrunk(code: str) -> str:
    """The code with the sizes of a small model and a few steps, as arguments or options."""
    for name, value in SMALL.items():
        code = re.sub(rf"\b{name}=\d+", f"{name}={value}", code)
        code = re.sub(rf"--{name.replace('_', '-')} \d+", f"--{name.replace('_', '-')} {value}", code)
    return code


def save_workplace(folder: Path) -> None:
    """A small checkpoint under the pages' name, and the engines that they build: they find them built."""
    WAN.save_pipeline(folder / "wan-1.3b")
    for videos in (1, 2):
        build(folder / "wan-1.3b", folder / "engines", **SIZES, stg_blocks=[BLOCK], max_batch=videos)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_once: BuiltOnce) -> Path:
    """The working folder of the pages' commands and code; the family's defaults fit the small model."""
    folder = tmp_path / "workplace"
    shutil.copytree(built_once("documented-workplace", save_workplace), folder)
    monkeypatch.chdir(folder)
    small = replace(
        Wan.defaults,
        stg_blocks=(BLOCK,),
        text_length=TEXT_LENGTH,
        num_inference_steps=SMALL["num_inference_steps"],
    )
    monkeypatch.setattr(Wan, "defaults", small)
    return folder


def test_the_readmes_commands_run(workplace: Path) -> None:
    lines = [command for page, command in COMMANDS if page == "README.md"]
    assert [shlex.split(line)[1] for line in lines] == ["build", "generate"]
    for line in lines:
        command, options = parsed(shlex.split(shrunk(line))[1:])
        command.callback(**options)
    assert (workplace / "fox.mp4").stat().st_size > 0


def test_the_readmes_python_runs(workplace: Path) -> None:
    (code,) = snippets("README.md", "python")
    names: dict[str, Any] = {}
    exec(shrunk(code), names)
    assert len(names["video"]) == SMALL["num_frames"]


def test_the_quickstarts_python_runs(workplace: Path) -> None:
    names: dict[str, Any] = {}
    for code in snippets("docs/quickstart.md", "python"):
        exec(shrunk(code), names)
    assert names["frames"].shape == (1, SMALL["num_frames"], SMALL["height"], SMALL["width"], 3)
    assert names["pipe"].interrupt


@pytest.mark.parametrize("page", OTHER_PYTHON_PAGES)
def test_python_of_other_pages_runs_with_a_pipeline(page: str, workplace: Path) -> None:
    names: dict[str, Any] = {"pipe": VideoPipeline.from_pretrained("wan-1.3b", engines="engines")}
    for code in snippets(page, "python"):
        exec(code, names)
