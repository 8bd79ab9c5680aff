"""Arguments and checkpoints that cannot be used: one line each, and nothing written.

The command line is called in this process; a case of each kind starts it as users do.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stg_trt.engines.store import EngineRequest, EngineStore
from stg_trt.runtime.device import Cpu
from tests.conftest import BuiltOnce
from tests.support.cli import (
    SIZES,
    SMALL,
    WEIGHTS,
    assert_one_line_error,
    contents,
    invoke,
    keep_one_block,
    run,
    some_started,
)
from tests.support.family_cases import LTX, FamilyCase
from tests.support.whole_pipelines import TEXT_LENGTH

# The cases that start the program.
STARTED = {"unknown flag", "weights cut short", "negative stg scale"}
Flags = dict[str, str | None]
BUILD: Flags = {
    "--height": "128",
    "--width": "160",
    "--num-frames": "17",
    "--text-length": "9",
    "--stg-blocks": "1",
}
BUILD_ARGUMENTS: dict[str, tuple[Flags, str]] = {
    "unknown flag": ({"--hieght": "128"}, r"No such option: --hieght .*: see stg-trt build --help"),
    "no number": ({"--height": "tall"}, "Invalid value for '--height': .*: see stg-trt build --help"),
    "no size": ({"--height": None}, r"sizes: expected height, .*got None, 160, 17: give all three, or --si"),
    "backend": ({"--backend": "openvino"}, "backend: expected one of onnxruntime, .*got 'openvino': choose"),
    "layout": ({"--layout": "triple"}, "layout: expected one of segmented, twin, got 'triple': choose"),
    "mode": ({"--stg-mode": "stg-z"}, "stg_mode: expected one of stg-a, stg-r, got 'stg-z': choose"),
    "no blocks": ({"--stg-blocks": "one"}, "stg_blocks: expected numbers .*got 'one': write 14,19"),
    "block too high": ({"--stg-blocks": "1,5"}, r"stg_blocks: expected .*0 to 4, got \[5\]: name"),
    "height": ({"--height": "100"}, "height: expected a positive multiple of 32, got 100: use 96"),
    "frames": ({"--num-frames": "16"}, r"num_frames: expected 8k\+1, got 16: use 17"),
    "text length": ({"--text-length": "0"}, "text_length: expected a positive .*got 0: use 128"),
    "precision": (
        {"--precision": "fp7"},
        "precision: expected fp32 or fp8 for onnxruntime, got 'fp7': use --precision",
    ),
    "precision of another backend": (
        {"--precision": "bf16"},
        "precision: expected fp32 or fp8 for onnxruntime, got 'bf16': "
        "use --precision fp32 or another backend",
    ),
    "target": ({"--target": "sm_90"}, "target: expected one of cpu for onnxruntime, got 'sm_90': choose"),
    "twin of nothing": (
        {"--layout": "twin", "--stg-blocks": ""},
        "stg_blocks: expected blocks for the twin layout, got none: name them",
    ),
}
CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "expected a diffusers folder or one of .*ltx.*got .*neither: check"),
    "no transformer": (
        lambda c: shutil.rmtree(c / "transformer"),
        "expected a diffusers folder with transformer/config.json, got none in .*: give the folder",
    ),
    "no scheduler": (
        lambda c: shutil.rmtree(c / "scheduler"),
        "expected a diffusers folder with scheduler/scheduler_config.json, got none in .*: give the folder",
    ),
    "no weights": (
        lambda c: (c / "transformer" / WEIGHTS).unlink(),
        f"expected the weights transformer/{WEIGHTS}, got no such file: download",
    ),
    "config cut short": (
        lambda c: (c / "transformer/config.json").write_text('{"_class_name": "LTX'),
        "expected JSON in .*config.json, got .*: download the checkpoint again",
    ),
    "config is a list": (
        lambda c: (c / "transformer/config.json").write_text("[]"),
        "expected an object in .*config.json, got list: correct it",
    ),
    "other class": (
        lambda c: edit(c, _class_name="UNet3DConditionModel"),
        "expected a transformer of class CogVideoX.*, WanTransformer3DModel, got UNet3DCondition",
    ),
    "entry missing": (
        lambda c: edit(c, num_layers=None),
        "expected num_layers in .*config.json, got no such entry: download",
    ),
    "number as text": (
        lambda c: edit(c, num_layers="five"),
        "expected num_layers in .*config.json as a positive integer, got 'five': download",
    ),
    "patches": (
        lambda c: edit(c, patch_size=2),
        "expected patch_size 1 in .*config.json, .* got 2: use a checkpoint without patches",
    ),
    "weights cut short": (
        lambda c: cut_short(c / "transformer" / WEIGHTS),
        f"expected a whole safetensors file, got .*{WEIGHTS} .*: download it again",
    ),
    "more blocks than the config": (
        lambda c: edit(c, num_layers=4),
        "expected the .* weights of config.json, got transformer_blocks.4.*: .*another model",
    ),
    "other width than the config": (
        lambda c: edit(c, attention_head_dim=32, cross_attention_dim=64),
        r"expected \S+ of shape .* from config.json, got .*: the folder mixes two models",
    ),
    "missing shard": (
        lambda c: (shard(c) / "second.safetensors").unlink(),
        "expected the weights transformer/second.safetensors, got no such file: download",
    ),
    "broken index": (
        lambda c: (shard(c) / f"{WEIGHTS}.index.json").write_text('{"weight_map": 3}'),
        "expected weight_map in .*index.json to name files beside it, got something else: download",
    ),
}  # fmt: skip
GENERATE: dict[str, tuple[tuple[str, ...], str]] = {
    "suffix": (("--output", "x.gif"), "output: expected a name ending in .mp4 or .safetensors, got x.gif"),
    "no folder": (("--output", "none/x.mp4"), "output: expected an existing folder, got none: create it"),
    "below a file": (
        ("--output", "pyproject.toml/x.mp4"),
        "output: expected an existing folder, got pyproject.toml: create it",
    ),
    "no text encoder": (
        ("--prompt", "a red circle"),
        "checkpoint: expected a text encoder that model_index.json names, got none in ltx: pass",
    ),
    "mode": (("--stg-mode", "stg-z"), "stg_mode: expected one of stg-a, stg-r, got 'stg-z': choose"),
    "layout": (("--layout", "triple"), "layout: expected one of segmented, twin, got 'triple': choose"),
    "backend": (("--backend", "openvino"), "backend: expected one of onnxruntime, .*got 'openvino': choose"),
    "no number": (("--guidance-scale", "3,high"), "guidance_scale: expected a number, .*'3,high': correct"),
    "true CFG": (
        ("--true-cfg-scale", "6"),
        "true_cfg_scale: expected it for models that take guidance_scale as an input, got 6.0: use",
    ),
    "blocks": (("--stg-blocks", "1;3"), "stg_blocks: expected numbers .*got '1;3': write 14,19"),
    "size": (("--height", "64"), "built for height 128, the request is 64: rebuild with --height 64"),
    "frames": (("--num-frames", "16"), r"num_frames: expected 8k\+1, got 16: use 17"),
    "frame rate": (("--frame-rate", "inf"), "frame_rate: expected frames per second above 0, got inf: use"),
    "no embeds": (("--embeds", "none.safetensors"), "embeds: expected a safetensors file, got none.*: check"),
    "embeds of no tensors": (
        ("--embeds", "pyproject.toml"),
        "embeds: expected a safetensors file, got pyproject.toml .*: check it",
    ),
    "seed": (("--seed", str(1 << 70)), "Invalid value for '--seed': .*: see stg-trt generate --help"),
    "negative stg scale": (("--stg-scale=-1",), "stg_scale: expected a number from 0 .*got -1.0 .*: correct"),
    "too many scales": (("--stg-scale", "0,1,1"), "stg_scale: expected 2 entries, .*got 3: give"),
    "block not built": (("--stg-blocks", "2"), r"can perturb blocks \[1, 3\], the request is \[2\]: rebuild"),
}  # fmt: skip


def edit(checkpoint: Path, name: str = "transformer/config.json", **entries: object) -> None:
    """Changes entries of a configuration; None drops one."""
    path = checkpoint / name
    config = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def shard(checkpoint: Path) -> Path:
    """Splits the weights into two files and their index, and returns their folder."""
    folder = checkpoint / "transformer"
    names = {"first.safetensors": slice(None, 9), "second.safetensors": slice(9, None)}
    tensors = load_file(folder / WEIGHTS)
    weight_map: dict[str, str] = {}
    for name, part in names.items():
        keys = list(tensors)[part]
        save_file({key: tensors[key] for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, ltx_checkpoint: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    for name in ("transformer", "scheduler"):
        shutil.copytree(ltx_checkpoint / name, tmp_path / "checkpoint" / name)
    return tmp_path / "checkpoint"


def answered(case: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return (run if case in STARTED else invoke)(*arguments)


def generate(
    checkpoint: Path, engines: Path, tmp_path: Path, *arguments: str | Path
) -> tuple[str | Path, ...]:
    """The command line of a call of two steps."""
    output = () if "--output" in arguments else ("--output", tmp_path / "x.safetensors")
    return ("generate", checkpoint, "--engines", engines, "--num-inference-steps=2", *output, *arguments)


@pytest.mark.parametrize("case", some_started(BUILD_ARGUMENTS, STARTED))
def test_build_arguments(case: str, tmp_path: Path, ltx_checkpoint: Path) -> None:
    changed, pattern = BUILD_ARGUMENTS[case]
    options = {**BUILD, **changed}
    flags = [f"{name}={value}" for name, value in options.items() if value is not None]
    result = answered(case, "build", ltx_checkpoint, "--output", tmp_path / "out", *flags)
    assert_one_line_error(result, pattern)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (("--random-weights", "--blocks=0"), "blocks: expected num_layers 1 to 5, got 0: write --blocks 2"),
        (("--random-weights", "--blocks=6"), "blocks: expected num_layers 1 to 5, got 6: write --blocks 2"),
        (("--random-weights", "--blocks=2,2"), "blocks: expected num_layers 1 to 5, got 2,2: write"),
        (("--random-weights", "--blocks=two"), "blocks: expected numbers .*, got 'two': write 3"),
        (("--blocks=2",), "blocks: expected random weights, .*: add --random-weights or leave --blocks out"),
        (
            ("--random-weights", "--blocks=2", "--stg-blocks=3"),
            r"stg_blocks: expected block numbers from 0 to 1, got \[3\]: name .* such as --stg-blocks 1",
        ),
    ],
    ids=["none", "too many", "two lists", "no number", "real weights", "perturbed one is gone"],
)
def test_fewer_blocks(tmp_path: Path, ltx_checkpoint: Path, flags: tuple[str, ...], pattern: str) -> None:
    result = invoke("build", ltx_checkpoint, "--output", tmp_path / "out", *SIZES, *flags)
    assert_one_line_error(result, pattern)
    assert not list(tmp_path.iterdir())


def test_a_shortened_model_builds_with_a_key_of_its_own(tmp_path: Path, ltx_checkpoint: Path) -> None:
    flags = (*SMALL, "--verify-timesteps=0", "--random-weights", "--output", tmp_path / "out")
    for blocks in (1, 2):
        result = invoke("build", ltx_checkpoint, *flags, f"--blocks={blocks}")
        assert result.returncode == 0, result.stderr
    store = EngineStore.open(tmp_path / "out")
    stops = {build.manifest.segments[-1].segment.stop: build.manifest.weights for build in store.builds}
    assert stops.keys() == {1, 2} and len(set(stops.values())) == 2


@pytest.mark.parametrize("case", some_started(CHECKPOINTS, STARTED))
def test_checkpoints(case: str, tmp_path: Path, checkpoint: Path) -> None:
    damage, pattern = CHECKPOINTS[case]
    damage(checkpoint)
    before = contents(checkpoint) if checkpoint.exists() else {}
    result = answered(case, "build", checkpoint, "--output", tmp_path / "out", *SMALL)
    assert_one_line_error(result, f"checkpoint: {pattern}")
    assert not (tmp_path / "out").exists()
    assert before == (contents(checkpoint) if checkpoint.exists() else {})


def test_a_published_configuration_has_no_weights(tmp_path: Path) -> None:
    result = invoke("build", "ltx-video-2b", "--output", tmp_path / "out", *SMALL)
    assert_one_line_error(result, "got the configuration ltx-video-2b: .*add --random-weights")


def test_a_sharded_checkpoint_builds(tmp_path: Path, checkpoint: Path) -> None:
    keep_one_block(checkpoint)
    shard(checkpoint)
    result = invoke("build", checkpoint, "--output", tmp_path / "out", *SMALL, "--verify-timesteps", "1")
    assert result.returncode == 0, result.stderr
    assert EngineStore.open(tmp_path / "out").find(EngineRequest(height=128)).load_engines(Cpu())


@pytest.mark.parametrize("case", some_started(GENERATE, STARTED))
def test_generate_arguments(
    case: str, tmp_path: Path, ltx_checkpoint: Path, ltx_engines: Path, embeds: Path
) -> None:
    arguments, pattern = GENERATE[case]
    source = () if {"--prompt", "--embeds"} & set(arguments) else ("--embeds", embeds)
    before = contents(ltx_engines)
    command = generate(ltx_checkpoint, ltx_engines, tmp_path, *source, "--layout", "segmented", *arguments)
    assert_one_line_error(answered(case, *command), pattern)
    assert not list(tmp_path.iterdir())
    assert contents(ltx_engines) == before


def test_a_prompt_that_is_too_long(
    tmp_path: Path, built_once: BuiltOnce, whole_engines: Callable[[FamilyCase, Path], Path]
) -> None:
    checkpoint = built_once(f"{LTX}-whole-checkpoint", LTX.save_pipeline)
    engines, output = whole_engines(LTX, checkpoint), tmp_path / "x.mp4"
    prompt = ("--prompt", "a red circle moves to the right " * TEXT_LENGTH)
    result = invoke("generate", checkpoint, "--engines", engines, "--output", output, *prompt)
    assert_one_line_error(
        result, rf"expected at most {TEXT_LENGTH} tokens, got (\d+): .*rebuild with --text-length \1$"
    )
    assert not output.exists()


def test_embeds_that_do_not_fit(
    tmp_path: Path, ltx_checkpoint: Path, ltx_engines: Path, embeds: Path
) -> None:
    tensors, wrong_embeds = load_file(embeds), tmp_path / "wrong.safetensors"
    cases = {
        r"prompt_embeds: expected \(videos, <= 9, 24\), got \(1, 10, 24\): .*larger --text-length": {
            **tensors,
            "prompt_embeds": torch.zeros(1, 10, 24),
        },
        "embeds: expected tensors prompt_embeds, .*, got also prompt_embed: leave": {
            **tensors,
            "prompt_embed": torch.zeros(1),
        },
    }
    for pattern, wrong in cases.items():
        save_file(wrong, wrong_embeds)
        result = invoke(*generate(ltx_checkpoint, ltx_engines, tmp_path, "--embeds", wrong_embeds))
        assert_one_line_error(result, pattern)
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.safetensors"]
