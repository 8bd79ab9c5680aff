"""Engine folders that do not fit or were damaged: refused in one line, and repaired by building again.

The command line is called in this process; two cases start it as users do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from stg_trt.engines import manifest as manifests
from stg_trt.engines.store import EngineRequest, EngineStore
from stg_trt.runtime.device import Cpu
from tests.support.cli import WEIGHTS, assert_one_line_error, contents, invoke, run, some_started

AGAIN = "build the engines again"


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def rewrite(build: Path, **changes: object) -> None:
    """A manifest that was written with other contents, its digest included."""
    manifests.save(manifests.load(build).model_copy(update=changes), build)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (
        lambda b: flip_a_byte(b / "back.onnx"),
        rf"back\.onnx: its contents changed after the build: {AGAIN}",
    ),
    "engine cut short": (
        lambda b: cut_in_half(b / "text.onnx"),
        rf"text\.onnx: expected \d+ bytes, got \d+: {AGAIN}",
    ),
    "engine missing": (lambda b: (b / "front.onnx").unlink(), rf"front\.onnx: no such file: {AGAIN}"),
    "manifest edited": (
        lambda b: edit(b / "manifest.json", '"max_batch": 2', '"max_batch": 8'),
        rf"manifest\.json: expected what the build wrote, got an edited file .*: {AGAIN}",
    ),
    "manifest cut short": (
        lambda b: cut_in_half(b / "manifest.json"),
        rf"manifest\.json: not JSON .*: {AGAIN}",
    ),
    "manifest missing": (
        lambda b: (b / "manifest.json").unlink(),
        r"manifest\.json: no such file: the build was not finished; run it again",
    ),
    "build not finished": (
        lambda b: rewrite(b, complete=False),
        "the build is not finished: run it again with the same options to finish it",
    ),
    "other graphs": (
        lambda b: rewrite(b, export_version="1.0"),
        rf"built with export version 1\.0 of ltx-video, this one makes \d+\.\d+: {AGAIN}",
    ),
    "other schema": (
        lambda b: rewrite(b, schema_version=1),
        rf"expected schema version 3, got 1: {AGAIN}",
    ),
    "no builds": (shutil.rmtree, "expected a build in .*, got an empty folder: build first"),
}


# The case that starts the program.
STARTED = {"flipped byte"}


@pytest.fixture
def build(tmp_path: Path, ltx_engines: Path) -> Path:
    """A copy of the segmented build, alone in its folder."""
    (source,) = ltx_engines.glob("segmented-*")
    return Path(shutil.copytree(source, tmp_path / "engines" / source.name))


@pytest.mark.parametrize("case", some_started(DAMAGES, STARTED))
def test_damaged(case: str, tmp_path: Path, build: Path, ltx_checkpoint: Path, embeds: Path) -> None:
    damage, pattern = DAMAGES[case]
    damage(build)
    before = contents(tmp_path)
    output = tmp_path / "x.safetensors"
    arguments = ("--engines", build.parent, "--output", output, "--embeds", embeds)
    ask = run if case in STARTED else invoke
    assert_one_line_error(ask("generate", ltx_checkpoint, *arguments), pattern)
    assert contents(tmp_path) == before


def test_no_folder(tmp_path: Path, ltx_checkpoint: Path, embeds: Path) -> None:
    arguments = ("--engines", tmp_path / "none", "--output", tmp_path / "x.safetensors", "--embeds", embeds)
    pattern = "engines: expected a folder made by stg-trt build, got .*none: check the path"
    assert_one_line_error(invoke("generate", ltx_checkpoint, *arguments), pattern)
    assert_one_line_error(invoke("inspect", tmp_path / "none"), pattern)


def test_other_weights(tmp_path: Path, build: Path, ltx_checkpoint: Path, embeds: Path) -> None:
    for name in ("transformer", "scheduler"):
        shutil.copytree(ltx_checkpoint / name, tmp_path / "checkpoint" / name)
    weights = tmp_path / "checkpoint/transformer" / WEIGHTS
    tensors = load_file(weights)
    tensors["proj_out.bias"][0] += 1
    save_file(tensors, weights)
    output = tmp_path / "x.safetensors"
    arguments = ("--engines", build.parent, "--output", output, "--embeds", embeds)
    result = invoke("generate", tmp_path / "checkpoint", *arguments)
    assert_one_line_error(result, f"built from other weights: {AGAIN} from this checkpoint")
    assert not output.exists()


def test_a_mode_that_was_not_built(
    tmp_path: Path, ltx_engines: Path, ltx_checkpoint: Path, embeds: Path
) -> None:
    (source,) = ltx_engines.glob("twin-stg-r-*")
    shutil.copytree(source, tmp_path / "engines" / source.name)
    output = tmp_path / "x.safetensors"
    arguments = ("--engines", tmp_path / "engines", "--output", output, "--embeds", embeds)
    result = invoke("generate", ltx_checkpoint, *arguments, "--stg-mode", "stg-a")
    assert_one_line_error(
        result, r"skipped engine is stg-r \[3\], .*--stg-mode stg-a --stg-blocks 3: rebuild"
    )
    assert not output.exists()


def test_building_again_repairs(build: Path, ltx_checkpoint: Path) -> None:
    before = contents(build)
    flip_a_byte(build / "text.onnx")
    sizes = ("--height=128", "--width=160", "--num-frames=17", "--text-length=9")
    options = (*sizes, "--stg-blocks=1,3", "--stg-mode=stg-a", "--max-batch=2")
    result = invoke("build", ltx_checkpoint, "--output", build.parent, *options)
    assert result.returncode == 0, result.stderr
    assert "front: already built" in result.stderr and "text: done" in result.stderr
    after = contents(build)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"text.onnx", "manifest.json"}
    assert EngineStore.open(build.parent).find(EngineRequest()).load_engines(Cpu())


def test_the_folder_that_build_prints_is_taken(
    tmp_path: Path, build: Path, ltx_checkpoint: Path, embeds: Path
) -> None:
    output = tmp_path / "x.safetensors"
    steps = ("--num-inference-steps=4", "--embeds", embeds, "--output", output)
    made = invoke("generate", ltx_checkpoint, "--engines", build, *steps)
    assert made.returncode == 0 and output.exists(), made.stderr
    shown = invoke("inspect", build)
    assert shown.returncode == 0 and f"{build.name}: ltx-video" in shown.stdout, shown.stderr


def test_a_folder_without_builds_is_refused(tmp_path: Path) -> None:
    for got in ("an empty folder", r"a folder without manifest\.json"):
        pattern = f"engines: expected a build in .*, got {got}: build first"
        assert_one_line_error(invoke("inspect", tmp_path), pattern)
        (tmp_path / "notes.txt").touch()


def test_inspect_names_what_is_unusable(build: Path) -> None:
    bracketed = build.rename(build.with_name("[red]mine"))
    result = invoke("inspect", build.parent)
    assert result.returncode == 0 and "[red]mine: ltx-video" in result.stdout, result.stderr
    edit(bracketed / "manifest.json", '"max_batch": 2', '"max_batch": 8')
    result = invoke("inspect", build.parent)
    assert result.returncode == 0 and "[red]mine: unusable: " in result.stdout, result.stderr


def test_inspect_prints_the_manifests_commands(build: Path) -> None:
    """Whole, one per line: a terminal's width does not cut them, and nothing in them is taken for markup."""
    kept = [command for record in manifests.load(build).segments for command in record.commands]
    assert len(kept) == len(manifests.load(build).segments)
    assert commands_shown(build) == kept
    lines = (
        "trtexec --onnx=onnx/back.onnx --minShapes=x:1x4",
        f"polygraphy run [red]back {'x:[1,4] ' * 40}end",
    )
    segments = tuple(
        record.model_copy(update={"commands": lines}) for record in manifests.load(build).segments
    )
    rewrite(build, segments=segments)
    assert commands_shown(build) == [*lines] * len(segments)


def commands_shown(build: Path) -> list[str]:
    """The lines that begin with the name of a tool."""
    shown = invoke("inspect", "--commands", build)
    assert shown.returncode == 0, shown.stderr
    return [line for line in shown.stdout.splitlines() if line.startswith(("trtexec", "polygraphy"))]
