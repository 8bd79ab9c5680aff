"""Other weights of the same model: no graph is exported again, and the engines are those of a fresh build."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from stg_trt import build
from stg_trt.build_engines import graph_weights, kept_graphs, onnx_compiler
from stg_trt.build_engines.export import PieceGraph
from stg_trt.build_engines.kept_graphs import FOLDER, KeptGraphs
from stg_trt.build_engines.onnx_compiler import OnnxCompiler
from stg_trt.build_engines.piece_key import PieceKey
from stg_trt.engines import manifest as manifests
from stg_trt.engines.key import export_version
from stg_trt.engines.store import EngineStore
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import TEXT
from stg_trt.system.files import file_sha256
from tests.support.cli import invoke
from tests.support.family_cases import CASES, LTX, WAN, FamilyCase
from tests.support.fine_tuned import save_fine_tuned
from tests.support.golden_builds import (
    LTX2,
    LTX2_BLOCK,
    LTX2_SIZES,
    OPEN_SORA,
    OPEN_SORA_SIZES,
    SVD_BLOCKS,
    SVD_SIZES,
)
from tests.support.tiny_lora import save_lora
from tests.support.tiny_svd import SVD

SLOW = pytest.mark.slow(reason="exports the graphs of a family")
LTX_OPTIONS: dict[str, Any] = {**LTX.sizes, "stg_blocks": LTX.cut_at, "stg_mode": "stg-a"}
SMALL: dict[str, Any] = {**LTX.sizes, "stg_blocks": [], "verify_timesteps": 1}
MODELS: dict[str, tuple[Path, dict[str, Any]]] = {
    **{str(case): (case.goldens, {**case.sizes, "stg_blocks": case.cut_at}) for case in CASES},
    "ltx2": (LTX2["2.3"], {**LTX2_SIZES, "stg_blocks": [LTX2_BLOCK]}),
    "open_sora": (OPEN_SORA, {**OPEN_SORA_SIZES, "stg_blocks": [2, 3]}),
    "svd": (SVD, {**SVD_SIZES, "stg_blocks": SVD_BLOCKS}),
}


@dataclass
class Exports:
    """The segments whose pieces were exported since it was cleared, as in a process that just started."""

    names: list[str]
    patch: pytest.MonkeyPatch

    def restart(self) -> None:
        self.names.clear()
        self.patch.setattr(OnnxCompiler, "_graphs", {})


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> Exports:
    names: list[str] = []
    made = onnx_compiler.export

    def export(segment: str, *given: Any, **options: Any) -> PieceGraph:
        names.append(segment)
        return made(segment, *given, **options)

    monkeypatch.setattr(onnx_compiler, "export", export)
    return Exports(names, monkeypatch)


def hashes(folder: Path) -> dict[str, str]:
    """Of every file but the manifest, which has times."""
    return {
        path.name: file_sha256(path)
        for path in folder.iterdir()
        if path.is_file() and path.name not in ("manifest.json", ".lock")
    }


def reused(folder: Path) -> set[tuple[str, ...]]:
    return {record.reused for record in manifests.load(folder).segments}


@pytest.mark.parametrize(
    "name", [name if name == "ltx" else pytest.param(name, marks=SLOW) for name in MODELS]
)
def test_a_build_with_other_weights_is_a_fresh_one(
    name: str, tmp_path: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File by file; with the weights beside the graphs these are one and the same."""
    checkpoint, options = MODELS[name]
    monkeypatch.setattr(graph_weights, "_EMBEDDED_BYTES", 0)
    other = save_fine_tuned(checkpoint, tmp_path / "other")
    (first,) = build(checkpoint, tmp_path / "engines", **options, verify_timesteps=1)
    before = hashes(first)
    exports.restart()
    (beside,) = build(other, tmp_path / "engines", **options, verify_timesteps=1)
    assert not exports.names and beside != first
    exports.restart()
    (fresh,) = build(other, tmp_path / "fresh", **options, verify_timesteps=1)
    assert exports.names and hashes(beside) == hashes(fresh)
    assert reused(beside) == {("graph",)} and ("graph",) not in reused(fresh)
    made, anew = manifests.load(beside), manifests.load(fresh)
    assert [one.verification for one in made.segments] == [one.verification for one in anew.segments]
    assert [one.key for one in made.segments] == [one.key for one in anew.segments]
    assert hashes(first) == before
    assert all(before[name] != sha256 for name, sha256 in hashes(beside).items() if name.endswith(".data"))


def test_a_lora_needs_no_export(tmp_path: Path, exports: Exports) -> None:
    """Nor does another scale of it; console and manifest say that nothing was exported."""
    lora = tmp_path / "style.safetensors"
    save_lora(LTX, LTX.goldens, lora, 1)
    build(LTX.goldens, tmp_path / "engines", **LTX_OPTIONS)
    for scale in ("0.5", "0.7"):
        exports.restart()
        (folder,) = build(LTX.goldens, tmp_path / "engines", **LTX_OPTIONS, lora=[f"{lora}:{scale}"])
        assert not exports.names
        record = manifests.load(folder).record("block_1")
        assert record is not None and record.reused == ("graph",)
    exports.restart()
    (fresh,) = build(LTX.goldens, tmp_path / "fresh", **LTX_OPTIONS, lora=[f"{lora}:0.7"])
    assert exports.names and hashes(folder) == hashes(fresh)
    shown = invoke("inspect", folder)
    # The session may have had the graphs of the other segments before the first build.
    assert re.search(r"graph of an earlier build: ([\w, ]*, )?block_1\b", " ".join(shown.stdout.split()))


@pytest.mark.parametrize("case", [LTX, pytest.param(WAN, marks=SLOW)], ids=str)
def test_engines_compute_what_eager_does_with_the_new_weights(
    case: FamilyCase, tmp_path: Path, exports: Exports
) -> None:
    """A LoRA of LTX-Video, a fine-tune of Wan; and not what the first build's weights make of it."""
    options: dict[str, Any] = {**case.sizes, "stg_blocks": [], "verify_timesteps": 1}
    lora, checkpoint = [], case.goldens
    if case is LTX:
        save_lora(case, case.goldens, tmp_path / "style.safetensors", 1)
        lora = [f"{tmp_path / 'style.safetensors'}:0.8"]
    else:
        checkpoint = save_fine_tuned(case.goldens, tmp_path / "other")
    build(case.goldens, tmp_path / "engines", **options)
    exports.restart()
    (folder,) = build(checkpoint, tmp_path / "engines", **options, lora=lora)
    record = manifests.load(folder).record("normal")
    assert not exports.names and record is not None
    inputs = case.family.trace_inputs(record.segment, case.workload, 2)
    session = ort.InferenceSession(folder / record.files[0].name, providers=["CPUExecutionProvider"])
    feed = {spec.name: tensor.numpy() for spec, tensor in zip(record.inputs, inputs, strict=True)}
    (got,) = (torch.from_numpy(output) for output in session.run(None, feed))
    for opened, same in ((Checkpoint.open(checkpoint, lora=lora), True), (case.checkpoint, False)):
        module = case.family.module(opened.load_transformer(), record.segment, expand_masks=True)
        with torch.no_grad():
            (expected,) = module(*inputs)
        distance = (got - expected).norm() / expected.norm()
        assert (distance < 1e-5) == same and (distance > 1e-3) != same


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one build, whose graphs are kept."""
    root = tmp_path_factory.mktemp("kept") / "engines"
    build(LTX.goldens, root, **SMALL)
    return root


@pytest.fixture
def engines(small: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(small, tmp_path / "engines"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fine_tuned(LTX.goldens, tmp_path_factory.mktemp("other") / "checkpoint")


def test_the_folder_of_graphs_is_no_build(engines: Path) -> None:
    store = EngineStore.open(engines)
    assert len(store.builds) == 1 and not store.unreadable
    # Small: they have no weights.
    assert all(path.stat().st_size < 50_000 for path in (engines / FOLDER).iterdir())


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut_short, change_a_byte, remove], ids=lambda damage: damage.__name__)
def test_a_damaged_graph_is_exported_again(
    damage: Callable[[Path], None], engines: Path, other: Path, tmp_path: Path, exports: Exports
) -> None:
    kept = hashes(engines / FOLDER)
    for path in (engines / FOLDER).iterdir():
        damage(path)
    exports.restart()
    (folder,) = build(other, engines, **SMALL)
    assert len(exports.names) == len(kept) == 4 and reused(folder) == {()}
    assert hashes(engines / FOLDER) == kept
    exports.restart()
    (fresh,) = build(other, tmp_path / "fresh", **SMALL)
    assert hashes(folder) == hashes(fresh)


def test_a_graph_that_cannot_be_read_or_kept_costs_time_alone(
    engines: Path, other: Path, exports: Exports
) -> None:
    for path in (engines / FOLDER).iterdir():
        make_a_folder(path)
    exports.restart()
    with pytest.warns(UserWarning, match=r"the graph cannot be kept \(Is a directory\), a build with other"):
        (folder,) = build(other, engines, **SMALL)
    assert exports.names and manifests.load(folder).complete


def test_another_installation_exports_again(
    engines: Path, other: Path, exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in kept_graphs._installed():
        changed = kept_graphs._installed() | {name: "another"}
        exports.restart()
        with monkeypatch.context() as patch:
            patch.setattr(kept_graphs, "_installed", lambda changed=changed: changed)
            assert compiler_reads(engines, TEXT) is None, name
    assert compiler_reads(engines, TEXT) is not None


def test_another_configuration_exports_again(engines: Path, tmp_path: Path, exports: Exports) -> None:
    """What counts is the configuration's effect: each of these is another program of some piece."""
    wider = save_fine_tuned(LTX.goldens, tmp_path / "other")
    exports.restart()
    build(wider, engines, **SMALL | {"num_frames": 9})
    # The number of tokens counts, which the text has not.
    assert set(exports.names) == {"normal"}
    exports.restart()
    build(wider, engines, **SMALL | {"text_length": 5})
    assert "text" in exports.names


@pytest.mark.slow(reason="calibrates fp8")
def test_fp8_is_calibrated_anew_and_exports_nothing(
    engines: Path, other: Path, tmp_path: Path, exports: Exports
) -> None:
    """The scales are weights, and calibrated on the new ones; graphs of fp32 are no graphs of fp8."""
    options: dict[str, Any] = {**SMALL, "precision": "fp8", "calibration_steps": 2}
    exports.restart()
    build(LTX.goldens, engines, **options)
    assert "normal" in exports.names
    exports.restart()
    (folder,) = build(other, engines, **options)
    assert not exports.names
    exports.restart()
    (fresh,) = build(other, tmp_path / "fresh", **options)
    assert exports.names and hashes(folder) == hashes(fresh)
    assert len([*engines.glob("calibration-*.json")]) == 2


def compiler_reads(engines: Path, segment: Any) -> PieceGraph | None:
    """What the folder has of a piece of LTX-Video."""
    key, module = piece(segment)
    facts = {"export_version": export_version(LTX.family), "opset": OnnxCompiler.opset}
    return KeptGraphs(engines, facts).read(key, module)


def piece(segment: Any) -> tuple[PieceKey, SegmentModule]:
    family, workload = LTX.family, LTX.workload
    module = family.module(LTX.checkpoint.load_transformer(), segment, expand_masks=True).eval()
    borders = family.inputs(segment, workload), family.outputs(segment, workload)
    return PieceKey.of(module, *borders, onnx_compiler.TRACED_MAX_ROWS), module


def test_a_graph_of_other_weights_is_refused(engines: Path) -> None:
    """Whatever its name says: names, dtypes and shapes of all inputs and weights are compared."""
    key, module = piece(TEXT)
    facts = {"export_version": export_version(LTX.family), "opset": OnnxCompiler.opset}
    graphs = KeptGraphs(engines, facts)
    found = graphs.read(key, module)
    assert found is not None

    def changed(change: Callable[[ir.Graph], object]) -> PieceGraph | None:
        shutil.rmtree(engines / FOLDER)
        graph = found.graph.clone()
        change(graph)
        graphs.write(key, PieceGraph(graph, found.ir_version), engines)
        return graphs.read(key, module)

    assert changed(lambda graph: None) is not None
    assert changed(lambda graph: setattr(graph.inputs[-1], "name", "weight_9")) is None
    assert changed(lambda graph: setattr(graph.inputs[-1], "shape", ir.Shape((1, 2)))) is None
    assert changed(lambda graph: setattr(graph.inputs[-1], "type", ir.TensorType(ir.DataType.DOUBLE))) is None
    assert changed(lambda graph: setattr(graph.inputs[0], "type", ir.TensorType(ir.DataType.DOUBLE))) is None
    assert changed(lambda graph: graph.inputs.insert(-1, graph.inputs.pop())) is None
    assert changed(lambda graph: graph.inputs.pop(0)) is None


def test_a_piece_that_is_equal_to_no_other_is_not_kept(tmp_path: Path) -> None:
    key, module = piece(TEXT)
    alone = replace(key, module=(key.module, object()))
    graphs = KeptGraphs(tmp_path, {})
    graphs.write(alone, PieceGraph(ir.Graph([], [], nodes=[]), 10), tmp_path)
    assert not [*tmp_path.iterdir()] and graphs.read(alone, module) is None


def test_a_function_without_a_name_of_its_own_has_no_words() -> None:
    key, _ = piece(TEXT)

    def local() -> None: ...

    assert key.words() == replace(key).words()
    for part in (local, lambda: None, type("Local", (), {})):
        with pytest.raises(LookupError, match="has no name of its own"):
            replace(key, module=part).words()
