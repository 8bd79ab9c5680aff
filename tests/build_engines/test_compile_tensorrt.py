"""Real engines of a small bfloat16 model, compiled by TensorRT-RTX, which needs no GPU for it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stg_trt import build
from stg_trt.build_engines.compile_tensorrt import Cancelled, build_engine, compile_tensorrt
from stg_trt.build_engines.compiler import Job
from stg_trt.build_engines.export import PieceGraph
from stg_trt.build_engines.fused_attention import count_in_plan
from stg_trt.build_engines.kept_graphs import KeptGraphs
from stg_trt.build_engines.onnx_compiler import OnnxCompiler
from stg_trt.build_engines.progress import Silent
from stg_trt.build_engines.tensorrt_recipe import Recipe
from stg_trt.engines import manifest as manifests
from stg_trt.engines.key import digest
from stg_trt.engines.manifest import Manifest, SegmentRecord
from stg_trt.engines.store import check_file
from stg_trt.engines.tensorrt_library import library_version, load_library
from stg_trt.errors import GateMissed
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import LAYOUTS, Segment, cut
from stg_trt.system.interruptible import run_interruptibly
from tests.support.cli import PROGRAM
from tests.support.family_cases.case import GOLDENS

pytest.importorskip("tensorrt_rtx", reason="needs the wheel of TensorRT-RTX")

pytestmark = pytest.mark.slow(reason="compiles engines with TensorRT-RTX")

GraphOf = Callable[[OnnxCompiler, Job, Segment, SegmentModule], PieceGraph]
BACKEND = "tensorrt-rtx"
TARGETS = {"segmented": ("sm_120", "sm_89"), "twin": ("sm_120",)}
SIZE: dict[str, Any] = {"height": 128, "width": 128, "num_frames": 25, "text_length": 16}
LARGE = SIZE | {"height": 1024, "width": 1024, "num_frames": 57}
"""8,192 tokens: scores of S x S no longer hide behind what grows linearly."""

# Attentions per segment of three blocks: self and cross, in all but block 1 of the skipped twin.
ATTENTIONS = {
    "segmented": {"text": 0, "front": 2, "block_1": 2, "back": 2},
    "twin": {"text": 0, "normal": 6, "skipped": 5},
}


@dataclass
class Recorder(Silent):
    """The progress of a build."""

    finished: list[tuple[str, bool]] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)

    def stage(self, segment: Segment, stage: str) -> None:
        self.stages.append(stage)

    def finish(self, segment: Segment, record: SegmentRecord, reused: bool) -> None:
        self.finished.append((segment.name, reused))


def write_model(folder: Path, goldens: Path, num_layers: int, **changes: Any) -> Path:
    """A checkpoint of configurations alone: two heads of 64, as wide as a fused kernel wants them."""
    config = json.loads((goldens / "transformer" / "config.json").read_text())
    config |= {
        "attention_head_dim": 64,
        "num_attention_heads": 2,
        "cross_attention_dim": 128,
        "num_layers": num_layers,
        **changes,
    }
    for part, name, text in (
        ("transformer", "config.json", json.dumps(config)),
        (
            "scheduler",
            "scheduler_config.json",
            (goldens / "scheduler" / "scheduler_config.json").read_text(),
        ),
    ):
        (folder / part).mkdir(parents=True)
        (folder / part / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, ltx_checkpoint: Path) -> Path:
    return write_model(tmp_path_factory.mktemp("rtx") / "model", ltx_checkpoint, num_layers=3)


def options(layout: str, output: Path) -> dict[str, Any]:
    return SIZE | {
        "output": output,
        "stg_blocks": [1],
        "stg_mode": "stg-a",
        "layout": layout,
        "precision": "bf16",
        "backend": BACKEND,
        "target": ",".join(TARGETS[layout]),
        "random_weights": True,
        "verify_timesteps": 1,
        "keep_onnx": True,
    }


@pytest.fixture(scope="module")
def builds(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Build folders by layout, in the order of TARGETS."""
    root = tmp_path_factory.mktemp("rtx-engines")
    return {layout: build(model, **options(layout, root)) for layout in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_attention_is_one_fused_kernel(builds: dict[str, list[Path]], layout: str) -> None:
    for folder, target in zip(builds[layout], TARGETS[layout], strict=True):
        manifest = manifests.load(folder)
        assert manifest.complete and (manifest.backend, manifest.target) == (BACKEND, target)
        assert {r.segment.name: r.attentions for r in manifest.segments} == ATTENTIONS[layout]
        assert {r.segment.name: r.fused_attentions for r in manifest.segments} == ATTENTIONS[layout]


def test_a_picture_and_a_text_have_an_attention_each(tmp_path: Path) -> None:
    """Of the same queries. In a process of its own: TensorRT-RTX 1.7.1 died of two that share a scale too."""
    goldens = GOLDENS / "wan2.1_i2v"
    model = write_model(tmp_path / "model", goldens, num_layers=1, added_kv_proj_dim=128)
    command: list[str | Path] = [
        PROGRAM,
        "build",
        model,
        "--random-weights",
        "--output",
        tmp_path / "engines",
    ]
    sizes = ["--height=64", "--width=64", "--num-frames=5", "--stg-blocks=0"]
    gates = ["--backend", BACKEND, "--target=sm_120", "--precision=bf16", "--verify-timesteps=0"]
    ended = subprocess.run([*command, *sizes, *gates], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (folder,) = (tmp_path / "engines").glob("segmented-*")
    segments = manifests.load(folder).segments
    assert {r.segment.name: r.fused_attentions for r in segments} == {
        "text": 0,
        "front": 0,
        "block_0": 3,
        "back": 0,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_manifests_say_all_and_files_are_what_they_say(builds: dict[str, list[Path]], layout: str) -> None:
    opt = {"front": 2, "normal": 2, "skipped": 1}
    for folder, target in zip(builds[layout], TARGETS[layout], strict=True):
        manifest = manifests.load(folder)
        assert manifest.versions[BACKEND] == library_version(BACKEND)
        listed = {file.name for record in manifest.segments for file in record.files}
        assert listed == {f"{record.segment.name}.{target}.engine" for record in manifest.segments}
        assert {path.name for path in folder.glob("*.engine")} == listed
        for record in manifest.segments:
            for file in record.files:
                check_file(folder / file.name, file)
            assert record.key == digest(record.facts)
            assert record.facts["target"] == target and record.facts["graph_sha256"] == record.graph_sha256
            assert record.facts["profiles"] == [[1, opt.get(record.segment.name, 3), 3]]
            assert record.verification[0].relative_l2 <= 1e-4
            assert record.activation_bytes and record.flops and record.peak_bytes > 1 << 20
            assert record.seconds.keys() == {"reference", "export", "verify", "compile"}


def test_queries_keys_and_values_are_one_product(builds: dict[str, list[Path]]) -> None:
    """Why graphs leave them apart: the plan has one weight for the three, 128 channels to 3 times 128."""
    plan = (builds["segmented"][0] / "block_1.sm_120.engine").read_bytes()
    assert re.search(rb"const_payload_size=98304 dims=\{ 128 384 \}", plan)


def test_targets_share_the_graph_and_not_the_engine(builds: dict[str, list[Path]]) -> None:
    first, second = (manifests.load(folder) for folder in builds["segmented"])
    for one, other in zip(first.segments, second.segments, strict=True):
        assert one.graph_sha256 == other.graph_sha256 and one.verification == other.verification
        assert one.key != other.key and one.files[0].sha256 != other.files[0].sha256


def test_the_segmented_layout_holds_one_copy_of_the_weights(builds: dict[str, list[Path]]) -> None:
    def engine_bytes(manifest: Manifest) -> int:
        return sum(file.bytes for record in manifest.segments for file in record.files)

    segmented, twin = (engine_bytes(manifests.load(builds[layout][0])) for layout in LAYOUTS)
    assert segmented < 0.75 * twin


def test_graphs_are_kept_when_asked_and_nothing_else(builds: dict[str, list[Path]]) -> None:
    for folders in builds.values():
        names = {record.segment.name for record in manifests.load(folders[0]).segments}
        assert names <= {path.name.removesuffix(".onnx") for path in (folders[0] / "onnx").iterdir()}
        for folder in folders:
            left = {path.name for path in folder.iterdir() if path.suffix != ".engine"}
            assert left <= {"manifest.json", "onnx", ".lock"}


def test_a_finished_build_is_reused_and_a_damaged_file_is_built_again(
    builds: dict[str, list[Path]], model: Path
) -> None:
    first, second = builds["segmented"]
    damaged = second / "text.sm_89.engine"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    before = (first / "manifest.json").read_bytes()
    recorder = Recorder()
    again = build(model, **options("segmented", first.parent), progress=recorder)
    assert again == [first, second]
    assert recorder.finished == [("text", False), ("front", True), ("block_1", True), ("back", True)]
    assert any("compile for sm_89" in stage for stage in recorder.stages)
    assert not any("compile for sm_120" in stage for stage in recorder.stages)
    assert (first / "manifest.json").read_bytes() == before
    record = manifests.load(second).record("text")
    assert record is not None and manifests.load(second).complete
    check_file(damaged, record.files[0])


Bias = Tensor | None
Scale = float | None


def wide(
    self: SegmentModule, q: Tensor, k: Tensor, v: Tensor, bias: Bias = None, scale: Scale = None
) -> Tensor:
    """Attention in float32."""
    mask = None if bias is None else bias.float()
    mixed = scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, scale=scale)
    return mixed.to(q.dtype)


def square(
    self: SegmentModule, q: Tensor, k: Tensor, v: Tensor, bias: Bias = None, scale: Scale = None
) -> Tensor:
    """Self-attention under a mask of S x S."""
    if bias is None:
        position = q.mean(dim=(1, 3))[:, None]
        bias = position[..., :, None] * position[..., None, :]
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def unfused(
    self: SegmentModule, q: Tensor, k: Tensor, v: Tensor, bias: Bias = None, scale: Scale = None
) -> Tensor:
    """Self-attention by hand, its softmax written out."""
    if bias is not None:
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    weights = (q @ k.transpose(2, 3) * (scale or q.shape[3] ** -0.5)).float().exp()
    attended: Tensor = (weights / weights.sum(dim=3, keepdim=True)).to(q.dtype) @ v
    return attended


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory, ltx_checkpoint: Path) -> Callable[[], list[Path]]:
    """Builds a model of one block, for many tokens; the text segment is shared by the tests."""
    root = tmp_path_factory.mktemp("rtx-gates")
    source = write_model(root / "model", ltx_checkpoint, num_layers=1)
    changes = {"stg_blocks": [], "target": "sm_120", "verify_timesteps": 0, "keep_onnx": False}
    return lambda: build(source, **options("segmented", root / "engines") | LARGE | changes)


def with_new_blocks(graph: GraphOf) -> GraphOf:
    """Exports each block anew: a change of the code is no part of the key by which graphs are known."""

    def graph_of(self: OnnxCompiler, job: Job, piece: Segment, module: SegmentModule) -> PieceGraph:
        if not piece.blocks:
            return graph(self, job, piece, module)
        with (
            mock.patch.object(OnnxCompiler, "_graphs", {}),
            mock.patch.object(KeptGraphs, "read", return_value=None),
        ):
            return graph(self, job, piece, module)

    return graph_of


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (wide, "normal: tensorrt-rtx cannot compile it: "),
        (square, "normal: expected at most .* bytes of activations for 3 rows, got .* square of the tokens"),
        (unfused, "normal: expected 2 fused attentions, got 1: an attention of this segment was decomposed"),
    ],
    ids=["float32", "S x S mask", "decomposed"],
)
def test_a_slow_attention_misses_its_gate(
    one_block: Callable[[], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    attend: Callable[..., Tensor],
    message: str,
) -> None:
    monkeypatch.setattr(SegmentModule, "attend", attend)
    monkeypatch.setattr(OnnxCompiler, "graph_of", with_new_blocks(OnnxCompiler.graph_of))
    with pytest.raises(GateMissed, match=message):
        one_block()


def test_nothing_of_a_missed_gate_is_kept(one_block: Callable[[], list[Path]]) -> None:
    """After the faulty builds, the right one starts with the same file as they did: the text alone."""
    (folder,) = one_block()
    manifest = manifests.load(folder)
    assert manifest.complete and [r.fused_attentions for r in manifest.segments] == [0, 2]
    assert not (folder / "work").exists()


@pytest.fixture
def recipe(builds: dict[str, list[Path]], model: Path, tmp_path: Path) -> Recipe:
    """A compiler of the whole model for one target, in a folder of its own."""
    folder = builds["twin"][0]
    graph = tmp_path / "normal.onnx"
    graph.write_bytes((folder / "onnx" / graph.name).read_bytes())
    record = manifests.load(folder).record("normal")
    assert record is not None and record.segment == cut("twin", 3, "stg-a", (1,))[0]
    return Recipe(graph, record.inputs, ((1, 2, 3),), BACKEND, "sm_120")


def test_profiles_share_the_weights_and_add_kernels(
    builds: dict[str, list[Path]], recipe: Recipe, model: Path
) -> None:
    """Why TensorRT-RTX is given one: a plan names its attentions once per profile, and grows with each."""
    weight = Checkpoint.open(model, random_weights=True).load_transformer().proj_in.weight.bfloat16()
    several = replace(recipe, profiles=((1, 1, 1), (2, 2, 2), (3, 3, 3)))
    build_engine(load_library(BACKEND), several, threading.Event(), lambda phase: None)
    places = []
    for engine, profiles in ((builds["twin"][0] / "normal.sm_120.engine", 1), (several.engine, 3)):
        assert count_in_plan(engine) == 6 * profiles
        places.append(sum(engine.read_bytes().count(stored) for stored in either_way(weight)))
    assert places[0] == places[1] > 0


def test_an_event_cancels_the_compiler(recipe: Recipe) -> None:
    cancel = threading.Event()
    phases: list[str] = []

    def begun(phase: str) -> None:
        phases.append(phase)
        cancel.set()

    with pytest.raises(Cancelled):
        build_engine(load_library(BACKEND), recipe, cancel, begun)
    assert phases
    assert [path.name for path in recipe.graph.parent.iterdir()] == ["normal.onnx"]


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_stops_the_compiler_at_once(recipe: Recipe) -> None:
    interrupted = threading.Event()

    def interrupt(phase: str) -> None:
        if not interrupted.is_set():
            interrupted.set()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        compile_tensorrt(recipe, 6, interrupt)
    # The thread that compiled is done with it, and free for the next call.
    assert run_interruptibly(lambda: "free", lambda: None) == "free"
    assert [path.name for path in recipe.graph.parent.iterdir()] == ["normal.onnx"]


def test_a_disk_that_fills_up_stops_the_compiler(recipe: Recipe) -> None:
    """The builder writes while it builds: what is half written goes."""
    recipe.engine.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        compile_tensorrt(recipe, 6, lambda phase: None)
    assert [path.name for path in recipe.graph.parent.iterdir()] == ["normal.onnx"]


def test_a_graph_that_cannot_be_read_is_named(recipe: Recipe) -> None:
    recipe.graph.write_bytes(b"not a graph")
    with pytest.raises(GateMissed, match="normal: tensorrt-rtx cannot read the graph: "):
        compile_tensorrt(recipe, 6, lambda phase: None)


def test_random_weights_reach_the_engines(builds: dict[str, list[Path]], model: Path) -> None:
    checkpoint = Checkpoint.open(model, random_weights=True)
    assert manifests.load(builds["twin"][0]).weights == checkpoint.fingerprint()
    weight = checkpoint.load_transformer().proj_in.weight.bfloat16()
    data = (builds["twin"][0] / "normal.sm_120.engine").read_bytes()
    assert any(stored in data for stored in either_way(weight))


def either_way(weight: Tensor) -> tuple[bytes, bytes]:
    """A weight as bytes, and transposed: a plan may hold either."""
    plain, transposed = (tensor.contiguous().view(torch.int16).numpy() for tensor in (weight, weight.t()))
    return plain.tobytes(), transposed.tobytes()
