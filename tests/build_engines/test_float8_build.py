"""FP8 builds from calibration to video, and what is refused before the work starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stg_trt import VideoPipeline, build
from stg_trt.build_engines import calibration
from stg_trt.build_engines.calibration import Calibrator
from stg_trt.build_engines.guided_run import GuidedRun, RunOptions
from stg_trt.build_engines.progress import Silent
from stg_trt.engines import manifest as manifests
from stg_trt.engines.backends import check_float8
from stg_trt.engines.manifest import SegmentRecord
from stg_trt.errors import GateMissed, InvalidRequest
from stg_trt.models.segment import TEXT, Segment
from tests.support.cli import SIZES, assert_one_line_error, invoke
from tests.support.family_cases import LTX, WAN, FamilyCase
from tests.support.tiny_svd import SVD
from tests.support.whole_pipelines import TEXT_LENGTH

PROMPTS = ("a red circle", "a blue square")
CASES = {"ltx": LTX, "wan": WAN}
Built = dict[str, tuple[Path, Path]]

SLOW_FIXTURES = {"built": "calibrates and builds FP8 engines of two families"}


class Reused(Silent):
    """Which segments were taken from where they lie."""

    def __init__(self) -> None:
        self.segments: dict[str, bool] = {}

    def finish(self, segment: Segment, record: SegmentRecord, reused: bool) -> None:
        self.segments[segment.name] = reused


def build_float8(
    case: FamilyCase, checkpoint: Path, output: Path, prompts: tuple[str, ...] = PROMPTS, **options: Any
) -> Path:
    listed = output.parent / "prompts.txt"
    listed.write_text("\n".join(prompts))
    (folder,) = build(
        checkpoint,
        output,
        height=case.sizes["height"],
        width=case.sizes["width"],
        num_frames=case.sizes["num_frames"],
        text_length=TEXT_LENGTH,
        stg_blocks=[1],
        precision="fp8",
        calibration_prompts=listed,
        calibration_steps=2,
        verify_timesteps=1,
        **options,
    )
    return Path(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Whole tiny checkpoints of two families, and their builds."""
    folders = {}
    for name, case in CASES.items():
        root = tmp_path_factory.mktemp(f"float8-{name}")
        case.save_pipeline(root / "checkpoint")
        folders[name] = root / "checkpoint", build_float8(case, root / "checkpoint", root / "engines")
    return folders


@pytest.mark.parametrize("name", CASES)
def test_a_build_becomes_a_video(name: str, built: Built) -> None:
    checkpoint, folder = built[name]
    pipe = VideoPipeline.from_pretrained(checkpoint, engines=folder)
    videos = pipe(
        PROMPTS[0], guidance_scale=3.0, stg_scale=1.0, num_inference_steps=2, output_type="latent"
    ).frames
    assert torch.as_tensor(videos).isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_the_manifest_says_what_fp8_keeps_and_costs(name: str, built: Built) -> None:
    manifest = manifests.load(built[name][1])
    found = manifest.float8
    assert found is not None and found.prompts == PROMPTS and found.num_steps == len(found.steps) == 2
    assert manifest.workload.precision == "fp8" and manifest.workload.dtype == "float32"
    quantized = {int(layer.split(".")[2]) for layer in found.largest_inputs}
    assert quantized == {*range(manifest.model.num_blocks)} - {*found.kept_blocks}
    assert 0 < found.pred_error <= calibration.LARGEST_PRED_ERROR
    assert found.skip_error is not None and 0 < found.skip_error <= calibration.LARGEST_SKIP_ERROR
    assert {*found.segments} == {record.segment.name for record in manifest.segments}
    assert found.segments["text"] == 0 < found.segments["front"]
    for record in manifest.segments:
        assert bool(record.facts.get("float8")) == bool(record.segment.blocks)


def test_inspect_shows_it(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built["ltx"][1]
    monkeypatch.setenv("COLUMNS", "200")
    answer = invoke("inspect", folder.parent)
    assert answer.returncode == 0, answer.stderr
    assert "fp8: 30 layers, calibrated on 2 prompts in 2 steps; blocks kept whole: none" in answer.stdout
    assert "Relative errors by FP8" in answer.stdout and "cond - skip" in answer.stdout
    (shown,) = json.loads(invoke("inspect", folder.parent, "--json").stdout)["builds"]
    found = manifests.load(folder).float8
    assert found is not None and shown["float8"] == found.model_dump(mode="json")
    errors = {segment["name"]: segment["float8_error"] for segment in shown["segments"]}
    assert errors == found.segments


def test_the_same_again_measures_nothing(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, folder = built["ltx"]
    monkeypatch.setattr(GuidedRun, "trajectory", None)
    progress = Reused()
    assert build_float8(LTX, checkpoint, folder.parent, progress=progress) == folder
    assert progress.segments and all(progress.segments.values())


def test_a_calibration_is_reproduced(built: Built, tmp_path: Path) -> None:
    checkpoint, folder = built["ltx"]
    again = build_float8(LTX, checkpoint, tmp_path / "engines")
    first, second = (manifests.load(path) for path in (folder, again))
    assert first.float8 == second.float8 and folder.name == again.name
    graphs = [[record.graph_sha256 for record in manifest.segments] for manifest in (first, second)]
    assert graphs[0] == graphs[1]


def test_other_prompts_make_other_engines(built: Built, tmp_path: Path) -> None:
    """Except of the text, which has no FP8 layers."""
    checkpoint, folder = built["ltx"]
    other = build_float8(LTX, checkpoint, tmp_path / "engines", prompts=("green", "striped"))
    assert other.name != folder.name
    mine, theirs = ({r.segment.name: r for r in manifests.load(f).segments} for f in (folder, other))
    assert {name for name in mine if mine[name].facts == theirs[name].facts} == {"text"}


def test_too_large_an_error_ends_the_build(
    built: Built, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing of a model of three blocks would be FP8 without the perturbed one and its neighbours."""
    monkeypatch.setattr(calibration, "LARGEST_SKIP_ERROR", 1e-6)
    with pytest.raises(GateMissed, match=r"fp8: expected relative errors of at most 0.15 of the prediction"):
        build_float8(LTX, built["ltx"][0], tmp_path / "engines")


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "older GPU": (
        ("--backend=tensorrt-rtx", "--target=sm_120,sm_86", "--precision=fp8"),
        r"precision: expected a GPU of sm_89 or later .* for fp8, got sm_86: use --precision bf16",
    ),
    "inductor": (
        ("--backend=inductor", "--target=cpu", "--precision=fp8"),
        "precision: expected fp32 or bf16 for inductor, got 'fp8': use --precision fp32 or another backend",
    ),
    "prompts without fp8": (
        (f"--calibration-prompts={__file__}",),
        "calibration_prompts: expected none for fp32, which is not calibrated, got one: leave it out, or use",
    ),
    "steps without fp8": (("--calibration-steps=4",), "calibration_steps: expected none for fp32"),
    "no steps": (
        ("--precision=fp8", "--calibration-steps=0"),
        "calibration_steps: expected at least 1, got 0: use 8",
    ),
    "too few steps": (
        ("--precision=fp8", "--calibration-steps=1"),
        "calibration_steps: expected steps that FlowMatchEulerDiscreteScheduler can take, got 1 ",
    ),
    "no file": (
        ("--precision=fp8", "--calibration-prompts=nowhere.txt"),
        r"calibration_prompts: expected a text file with a prompt per line, got nowhere.txt \(",
    ),
    "empty file": (
        ("--precision=fp8", "--calibration-prompts=/dev/null"),
        "calibration_prompts: expected a prompt per line, got none in /dev/null: write some",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    output = tmp_path / "engines"
    answer = invoke("build", LTX.goldens, *SIZES, "--stg-blocks=1", *options, "--output", output)
    assert_one_line_error(answer, message)
    assert not output.exists()


def test_a_unet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="precision: expected a transformer for fp8, got svd: use"):
        build(SVD, tmp_path, height=64, width=64, num_frames=4, stg_blocks=[], precision="fp8")


SMS = [("sm_80", True), ("sm_86", True), ("sm_89", False), ("sm_90", False)]


@pytest.mark.parametrize(("sm", "refused"), SMS)
def test_the_gpu_here_must_have_fp8(sm: str, refused: bool) -> None:
    check_float8(sm, "bf16")
    if not refused:
        check_float8(sm, "fp8")
        return
    with pytest.raises(InvalidRequest, match=f"got {sm}: use --precision bf16"):
        check_float8(sm, "fp8")


def test_the_perturbed_blocks_neighbours_are_kept_if_cond_minus_skip_is_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The golden has five blocks and no text encoder: its run has random text."""
    limits = iter([False, True, True])
    monkeypatch.setattr(calibration, "_allows", lambda record: next(limits))
    workload = replace(LTX.workload, precision="fp8", activations="fp32")
    segments = (TEXT, *LTX.family.segments("segmented", "stg-a", (1,)))
    run = RunOptions(LTX.checkpoint, workload, segments, "stg-a", {"skip": (1,)}, steps=2)
    record = Calibrator(run, PROMPTS, tmp_path, Silent()).calibrate()
    assert record.prompts is None and record.kept_blocks == (0, 1, 2)
    assert {layer.split(".")[2] for layer in record.largest_inputs} == {"3", "4"}
    assert record.segments["block_1"] == 0 < record.segments["back"]


def test_the_largest_of_all_inputs_counts() -> None:
    largest: dict[str, float] = {}
    see = calibration.watch_input("layer", largest)
    for value in (1.0, -3.0, 2.0):
        see(torch.nn.Identity(), (torch.tensor([value, 0.5]),))
    assert largest == {"layer": 3.0}
