from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import stg_trt
from stg_trt.engines import manifest as manifests
from stg_trt.engines.manifest import FileRecord, Manifest
from stg_trt.engines.store import Build, EngineRequest, EngineStore, check_file
from stg_trt.errors import EngineRejected, InvalidRequest
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.workload import Workload
from stg_trt.runtime.device import Cpu
from stg_trt.system.files import file_sha256
from stg_trt.system.gpu import Gpu, Machine

MANIFEST = Manifest(
    stg_trt_version=stg_trt.__version__,
    export_version="2.4",
    versions={},
    backend="onnxruntime",
    target="cpu",
    gpu=None,
    family="ltx-video",
    transformer_config={"_class_name": "LTXVideoTransformer3DModel"},
    vae_config=None,
    weights="these",
    workload=Workload(128, 160, 17, 9),
    layout="segmented",
    stg_mode="stg-a",
    stg_blocks=(1, 3),
    max_batch=2,
    complete=True,
    segments=(),
)
FITS: dict[str, Any] = {
    "weights": "these",
    "height": 128,
    "width": 160,
    "num_frames": 17,
    "videos": 2,
    "layout": "segmented",
    "backend": "onnxruntime",
    "target": "cpu",
    "perturbations": frozenset({Perturbation("stg-a", (1, 3)), Perturbation("stg-r", (3,))}),
}


@pytest.fixture
def add(tmp_path: Path) -> Callable[..., Path]:
    """Writes a build folder whose manifest differs from MANIFEST as told."""

    def written(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        manifests.save(MANIFEST.model_copy(update=changes), folder)
        return folder

    return written


def machine(sm: str) -> Machine:
    return Machine(Gpu("a GPU", sm, 80 << 30, 132, "580.65"))


def perturbed(*perturbations: Perturbation) -> dict[str, Any]:
    return {"perturbations": frozenset(perturbations)}


def test_a_build_that_fits(tmp_path: Path, add: Callable[..., Path]) -> None:
    folder = add("build")
    store = EngineStore.open(tmp_path)
    assert store.find(EngineRequest()) == Build(folder, MANIFEST)
    assert store.find(EngineRequest(**FITS)).folder == folder


@pytest.mark.parametrize(
    ("request_changes", "reason"),
    [
        ({"weights": "others"}, "built from other weights: build the engines again from this checkpoint"),
        ({"layout": "twin"}, "layout is segmented, the request is twin: rebuild with --layout twin"),
        ({"backend": "tensorrt-rtx"}, "backend is onnxruntime, .*: rebuild with --backend tensorrt-rtx"),
        ({"target": "sm_120"}, "target is cpu, the request is sm_120: rebuild with --target sm_120"),
        ({"height": 96}, "built for height 128, the request is 96: rebuild with --height 96"),
        ({"width": 96}, "built for width 160, the request is 96: rebuild with --width 96"),
        ({"num_frames": 9}, "built for num_frames 17, the request is 9: rebuild with --num-frames 9"),
        ({"videos": 3}, "built for at most 2 videos at once, the request is 3: rebuild with --max-batch 3"),
        (
            perturbed(Perturbation("stg-a", (1,)), Perturbation("stg-a", (2, 3))),
            r"can perturb blocks \[1, 3\], the request is \[2, 3\]: "
            "rebuild with --stg-mode stg-a --stg-blocks 2,3",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_rejection_says_what_to_rebuild(
    tmp_path: Path, add: Callable[..., Path], request_changes: dict[str, Any], reason: str
) -> None:
    add("only")
    with pytest.raises(EngineRejected, match=f"no build in .* fits the request: only: {reason}$"):
        EngineStore.open(tmp_path).find(EngineRequest(**{**FITS, **request_changes}))


def test_the_release_that_built_it_does_not_count(tmp_path: Path, add: Callable[..., Path]) -> None:
    folder = add("build", stg_trt_version="0.0.9")
    assert EngineStore.open(tmp_path).find(EngineRequest(**FITS)).folder == folder


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"export_version": "0.9"},
            r"built with export version 0\.9 of ltx-video, this one makes 2\.\d+: build the engines again",
        ),
        (
            {"transformer_config": {"_class_name": "NewTransformer"}, "family": "new"},
            "built for new, which this release does not know: build the engines again",
        ),
    ],
    ids=["graphs", "family"],
)
def test_engines_of_other_graphs_are_refused(
    tmp_path: Path, add: Callable[..., Path], changes: dict[str, Any], reason: str
) -> None:
    add("build", **changes)
    with pytest.raises(EngineRejected, match=f"build: {reason}$"):
        EngineStore.open(tmp_path).find(EngineRequest())


def test_the_folder_of_a_build_is_taken(tmp_path: Path, add: Callable[..., Path]) -> None:
    """It is what `stg-trt build` prints; those beside it are not meant."""
    folder, _ = add("build"), add("another")
    store = EngineStore.open(folder)
    assert [build.folder for build in store.builds] == [folder]
    assert store.find(EngineRequest(**FITS)).folder == folder


def test_an_unfinished_build_is_not_used(tmp_path: Path, add: Callable[..., Path]) -> None:
    add("half", complete=False)
    with pytest.raises(EngineRejected, match="half: the build is not finished: run it again with the same"):
        EngineStore.open(tmp_path).find(EngineRequest())


def test_stg_a_needs_engines_that_were_built_for_it(tmp_path: Path, add: Callable[..., Path]) -> None:
    add("skips", stg_mode="stg-r")
    store = EngineStore.open(tmp_path)
    assert store.find(EngineRequest(**perturbed(Perturbation("stg-r", (1,)))))
    with pytest.raises(
        EngineRejected, match="built for stg-r, the request is stg-a: rebuild with --stg-mode"
    ):
        store.find(EngineRequest(**perturbed(Perturbation("stg-a", (1,)))))


def test_builds_have_as_many_skip_passes_as_they_were_built_for(
    tmp_path: Path, add: Callable[..., Path]
) -> None:
    limited = {"backend": "inductor", "layout": "segmented"}
    add("one", **limited)
    two = add("two", **limited, skip_passes={"spatial": (1,), "temporal": (3,)})
    store = EngineStore.open(tmp_path)
    assert store.find(EngineRequest(skips=2)).folder == two
    with pytest.raises(EngineRejected) as rejected:
        store.find(EngineRequest(skips=3))
    assert "one: built for 1 skip passes, the request has 3: rebuild with --stg-blocks" in str(rejected.value)
    # The CPU's engines take any number of rows.
    free = add("free")
    assert EngineStore.open(tmp_path).find(EngineRequest(skips=3)).folder == free


def test_a_twin_has_one_skip_pass(tmp_path: Path, add: Callable[..., Path]) -> None:
    add("twin", layout="twin")
    with pytest.raises(
        EngineRejected, match="twin layout has one skip pass, the request has 2: rebuild with"
    ):
        EngineStore.open(tmp_path).find(EngineRequest(skips=2))


def test_skip_passes_without_a_name_are_one() -> None:
    assert MANIFEST.skips == {"skip": (1, 3)}
    named = {"spatial": (1,), "temporal": (3,)}
    assert MANIFEST.model_copy(update={"skip_passes": named}).skips == named
    assert MANIFEST.model_copy(update={"stg_blocks": ()}).skips == {}


def test_a_twin_is_for_one_perturbation(tmp_path: Path, add: Callable[..., Path]) -> None:
    add("twin", layout="twin")
    store = EngineStore.open(tmp_path)
    assert store.find(EngineRequest(**perturbed(Perturbation("stg-a", (3, 1)))))
    for other in (Perturbation("stg-a", (1,)), Perturbation("stg-r", (1, 3))):
        with pytest.raises(
            EngineRejected, match=r"its skipped engine is stg-a \[1, 3\], the request is --stg"
        ):
            store.find(EngineRequest(**perturbed(other)))


def test_the_segmented_layout_comes_first(tmp_path: Path, add: Callable[..., Path]) -> None:
    twin, segmented = add("a", layout="twin"), add("b")
    store = EngineStore.open(tmp_path)
    assert store.find(EngineRequest()).folder == segmented
    assert store.find(EngineRequest(layout="twin")).folder == twin


def test_a_machine_is_given_what_it_can_run(tmp_path: Path, add: Callable[..., Path]) -> None:
    names = {
        "a": ("inductor", "cpu"),
        "b": ("onnxruntime", "cpu"),
        "c": ("inductor", "this-gpu"),
        "d": ("tensorrt-rtx", "sm_120"),
        "e": ("tensorrt-rtx", "sm_89"),
    }
    for name, (backend, target) in names.items():
        add(name, backend=backend, target=target)
    store = EngineStore.open(tmp_path)
    assert store.find(EngineRequest(machine=Machine())).folder.name == "b"
    for sm, best in {"sm_120": "d", "sm_89": "e", "sm_90": "c"}.items():
        assert store.find(EngineRequest(machine=machine(sm))).folder.name == best
    with pytest.raises(
        EngineRejected, match="d: compiled for sm_120, this GPU is sm_90: build with --target"
    ):
        store.find(EngineRequest(machine=machine("sm_90"), backend="tensorrt-rtx"))
    with pytest.raises(EngineRejected, match="e: runs on an NVIDIA GPU, this machine has none: build with"):
        store.find(EngineRequest(machine=Machine(), backend="tensorrt-rtx"))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"name": "NVIDIA H100 PCIe"}, r"NVIDIA H100 PCIe \(sm_90, 132 multiprocessors, driver 580\)"),
        ({"sm": "sm_80"}, r"NVIDIA H100 \(sm_80, 132 multiprocessors, driver 580\)"),
        ({"multiprocessors": 114}, r"NVIDIA H100 \(sm_90, 114 multiprocessors, driver 580\)"),
        ({"driver": "570.12"}, r"NVIDIA H100 \(sm_90, 132 multiprocessors, driver 570\)"),
    ],
    ids=["name", "sm", "multiprocessors", "driver"],
)
def test_an_engine_of_another_gpu_is_refused(
    tmp_path: Path, add: Callable[..., Path], change: dict[str, Any], got: str
) -> None:
    h100 = Gpu("NVIDIA H100", "sm_90", 80 << 30, 132, "580.95")
    other = replace(h100, driver="580.65")
    assert h100.identity == other.identity
    here = Machine(h100)
    add("foreign", backend="tensorrt", target="this-gpu", gpu=replace(other, **change).identity)
    with pytest.raises(
        EngineRejected,
        match=rf"foreign: compiled for {got}, this GPU is NVIDIA H100 \(sm_90, 132 multiprocessors, driver "
        r"580\): build the engines again here$",
    ):
        EngineStore.open(tmp_path).find(EngineRequest(machine=here))
    # A build made here again lies beside it, and is found.
    add("here", backend="tensorrt", target="this-gpu", gpu=other.identity)
    assert EngineStore.open(tmp_path).find(EngineRequest(machine=here)).folder.name == "here"


def test_all_candidates_are_explained(tmp_path: Path, add: Callable[..., Path]) -> None:
    add("large", workload=Workload(256, 256, 17, 9))
    add("other", weights="others")
    (add("edited") / manifests.FILE_NAME).write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("not a build")
    store = EngineStore.open(tmp_path)
    with pytest.raises(EngineRejected) as error:
        store.find(EngineRequest(weights="these", height=128))
    message = str(error.value)
    assert "large: built for height 256, the request is 128" in message
    assert "other: built from other weights" in message
    assert "edited: " in message and "not JSON" in message
    assert "empty: " in message and "the build was not finished" in message
    assert "notes" not in message


def test_folders_without_builds(tmp_path: Path) -> None:
    with pytest.raises(EngineRejected, match=r"expected a build in .*, got an empty folder: build first"):
        EngineStore.open(tmp_path).find(EngineRequest())
    with pytest.raises(
        EngineRejected, match=r"expected a folder made by stg-trt build, got .*: check the path"
    ):
        EngineStore.open(tmp_path / "nowhere")


def test_requests_for_what_does_not_exist() -> None:
    with pytest.raises(InvalidRequest, match="layout: expected one of segmented, twin, got 'sideways'"):
        EngineRequest(layout="sideways")
    with pytest.raises(InvalidRequest, match=r"backend: expected one of onnxruntime, .* got 'openvino'"):
        EngineRequest(backend="openvino")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file: build the engines again"),
        (b"short", "expected 7 bytes, got 5: build the engines again"),
        (b"changed", "its contents changed after the build: build the engines again"),
    ],
    ids=["missing", "cut", "changed"],
)
def test_engine_files_are_checked(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "back.engine"
    path.write_bytes(b"correct")
    record = FileRecord(name=path.name, bytes=7, sha256=file_sha256(path))
    check_file(path, record)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(EngineRejected, match=message):
        check_file(path, record)


def test_a_damaged_engine_is_not_loaded(ltx_engines: Path, tmp_path: Path) -> None:
    build = EngineStore.open(ltx_engines).find(EngineRequest(layout="segmented"))
    copies = {}
    for record in build.manifest.segments:
        for file in record.files:
            copies[file.name] = tmp_path / file.name
            copies[file.name].write_bytes((build.folder / file.name).read_bytes())
    copied = Build(tmp_path, build.manifest)
    assert copied.load_engines(Cpu()).keys() == {record.segment.name for record in build.manifest.segments}
    damaged = copies["back.onnx"]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(EngineRejected, match=r"back\.onnx: its contents changed after the build"):
        copied.load_engines(Cpu())


def test_a_loaded_engine_runs_on_what_is_bound(ltx_engines: Path) -> None:
    build = EngineStore.open(ltx_engines).find(EngineRequest(layout="segmented"))
    engine = build.load_engines(Cpu())["text"]
    first, second = engine.context(), engine.context()
    outputs = [torch.full((2, 9, 32), torch.nan) for _ in range(2)]
    for context, output, value in zip((first, second), outputs, (0.0, 1.0), strict=True):
        context.bind("prompt_embeds", torch.full((2, 9, 24), value))
        context.bind("text", output)
    first.enqueue(0)
    assert outputs[0].isfinite().all() and outputs[1].isnan().all()
    second.enqueue(0)
    assert not torch.allclose(outputs[0], outputs[1])
