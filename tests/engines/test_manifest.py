from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import stg_trt
from stg_trt.engines import manifest as manifests
from stg_trt.engines.manifest import FileRecord, Manifest, SegmentRecord, Verification
from stg_trt.errors import EngineRejected
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import TensorSpec
from stg_trt.models.workload import Workload
from stg_trt.system.gpu import GpuIdentity

RECORD = SegmentRecord(
    segment=Segment("skipped", 0, 6, True, True, skipped=Perturbation("stg-a", (3,))),
    inputs=(TensorSpec("latents", "bfloat16", ("rows", 60, 8)),),
    outputs=(TensorSpec("pred", "bfloat16", ("rows", 60, 8)),),
    key="k",
    facts={"rows": [1, 1, 3]},
    files=(FileRecord(name="skipped.engine", bytes=7, sha256="s"),),
    graph_sha256="o",
    flops=123,
    attentions=11,
    fused_attentions=11,
    attention_kernels=("flash",),
    activation_bytes=4096,
    verification=(Verification(timestep=999.0, cosine=1.0, relative_l2=1e-7, max_abs=1e-6),),
    commands=("trtexec --onnx=onnx/skipped.onnx",),
    seconds={"export": 1.5},
    peak_bytes=1 << 30,
)
MANIFEST = Manifest(
    stg_trt_version=stg_trt.__version__,
    export_version="1.1",
    versions={"torch": "2.9"},
    backend="tensorrt-rtx",
    target="sm_120",
    gpu=GpuIdentity("NVIDIA GeForce RTX 5090", "sm_120", 170, "580"),
    family="ltx-video",
    transformer_config={"num_layers": 6, "qk_norm": "rms_norm_across_heads", "norm_eps": 1e-6},
    vae_config=None,
    weights="w",
    workload=Workload(128, 160, 17, 9, "bf16"),
    layout="twin",
    stg_mode="stg-a",
    stg_blocks=(3,),
    max_batch=2,
    complete=True,
    segments=(RECORD,),
)


def written(folder: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / manifests.FILE_NAME).read_text())
    return body


def write(folder: Path, body: Any) -> None:
    (folder / manifests.FILE_NAME).write_text(json.dumps(body))


def signed(body: dict[str, Any]) -> dict[str, Any]:
    """The body with the digest that belongs to it, as another version of this library would write it."""
    rest = {name: value for name, value in body.items() if name != "sha256"}
    return {**rest, "sha256": manifests._digest(rest)}


def test_a_file_that_segments_share_counts_once() -> None:
    own = FileRecord(name="own.engine", bytes=5, sha256="o")
    both = RECORD.model_copy(update={"files": (*RECORD.files, own)})
    assert (RECORD.engine_bytes, both.engine_bytes) == (7, 12)
    assert MANIFEST.model_copy(update={"segments": (RECORD, both)}).engine_bytes == 12


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    manifests.save(MANIFEST, tmp_path)
    loaded = manifests.load(tmp_path)
    assert loaded == MANIFEST
    assert loaded.segments[0].segment == RECORD.segment and loaded.workload == MANIFEST.workload
    assert loaded.perturbation == Perturbation("stg-a", (3,))
    assert loaded.record("skipped") == RECORD and loaded.record("front") is None


def test_saving_again_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    manifests.save(MANIFEST, tmp_path)
    manifests.save(MANIFEST.model_copy(update={"complete": False}), tmp_path)
    assert not manifests.load(tmp_path).complete
    assert [path.name for path in tmp_path.iterdir()] == [manifests.FILE_NAME]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests.save(MANIFEST, tmp_path)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        manifests.save(MANIFEST.model_copy(update={"complete": False}), tmp_path)
    assert manifests.load(tmp_path) == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == [manifests.FILE_NAME]


LEAVES = [
    ("backend", "tensorrt"),
    ("weights", "x"),
    ("complete", False),
    ("max_batch", 3),
    ("stg_blocks", [4]),
    ("sha256", "0" * 64),
]


@pytest.mark.parametrize(("name", "value"), LEAVES, ids=[name for name, _ in LEAVES])
def test_the_digest_detects_an_edit(tmp_path: Path, name: str, value: Any) -> None:
    manifests.save(MANIFEST, tmp_path)
    write(tmp_path, {**written(tmp_path), name: value})
    with pytest.raises(EngineRejected, match=r"manifest\.json: .*edited.*: build the engines again"):
        manifests.load(tmp_path)


def test_the_digest_covers_the_hashes_of_engine_files(tmp_path: Path) -> None:
    manifests.save(MANIFEST, tmp_path)
    body = written(tmp_path)
    body["segments"][0]["files"][0]["sha256"] = "other"
    write(tmp_path, body)
    with pytest.raises(EngineRejected, match="edited"):
        manifests.load(tmp_path)


@pytest.mark.parametrize("name", ["schema_version", "export_version", "segments", "sha256"])
def test_a_missing_entry_is_refused(tmp_path: Path, name: str) -> None:
    manifests.save(MANIFEST, tmp_path)
    write(tmp_path, {key: value for key, value in written(tmp_path).items() if key != name})
    with pytest.raises(EngineRejected, match="build the engines again"):
        manifests.load(tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    manifests.save(MANIFEST.model_copy(update={"schema_version": 1}), tmp_path)
    with pytest.raises(EngineRejected, match="expected schema version 3, got 1: build the engines again"):
        manifests.load(tmp_path)


def test_a_build_of_another_release_is_read(tmp_path: Path) -> None:
    manifests.save(MANIFEST.model_copy(update={"stg_trt_version": "0.0.9"}), tmp_path)
    assert manifests.load(tmp_path).stg_trt_version == "0.0.9"


@pytest.mark.parametrize(
    "change", [{"unknown": 1}, {"max_batch": "many"}, {"workload": {}}, {"segments": [{}]}], ids=str
)
def test_entries_are_checked_even_when_signed(tmp_path: Path, change: dict[str, Any]) -> None:
    manifests.save(MANIFEST, tmp_path)
    write(tmp_path, signed({**written(tmp_path), **change}))
    with pytest.raises(EngineRejected, match=rf"{next(iter(change))}.*: build the engines again"):
        manifests.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file: the build was not finished; run it again"),
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[1]", "expected schema version 3, got list"),
        (b"{}", "expected schema version 3, got None"),
    ],
    ids=["missing", "empty", "cut", "binary", "list", "object"],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / manifests.FILE_NAME).write_bytes(content)
    with pytest.raises(EngineRejected, match=message):
        manifests.load(tmp_path)
