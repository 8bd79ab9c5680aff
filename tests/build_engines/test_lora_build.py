"""Builds with LoRAs beside one without: only what changes is compiled, and calls name the same LoRAs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stg_trt import VideoPipeline, build
from stg_trt.build_engines.progress import Silent
from stg_trt.engines import manifest as manifests
from stg_trt.engines.manifest import SegmentRecord
from stg_trt.engines.store import EngineStore
from stg_trt.errors import EngineRejected
from stg_trt.models.segment import Segment
from tests.support.cli import assert_one_line_error, invoke
from tests.support.family_cases import LTX
from tests.support.tiny_lora import save_lora


class Finished(Silent):
    """Segments by whether they were compiled."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.reused: list[str] = []

    def finish(self, segment: Segment, record: SegmentRecord, reused: bool) -> None:
        """Notes the name."""
        (self.reused if reused else self.compiled).append(segment.name)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_lora(LTX, LTX.goldens, path, 1)
    return path


@pytest.fixture
def engines(ltx_engines: Path, tmp_path: Path) -> Path:
    """The segmented build without LoRAs, alone."""
    found = next(one for one in EngineStore.open(ltx_engines).builds if one.manifest.layout == "segmented")
    shutil.copytree(found.folder, tmp_path / "engines" / found.folder.name)
    return tmp_path / "engines"


def test_only_changed_segments_are_compiled(engines: Path, lora: Path, tmp_path: Path, embeds: Path) -> None:
    options: dict[str, Any] = {**LTX.sizes, "stg_blocks": LTX.cut_at, "stg_mode": "stg-a", "max_batch": 2}
    progress = Finished()
    (folder,) = build(LTX.goldens, engines, lora=[f"{lora}:0.5"], **options, progress=progress)
    assert progress.compiled == ["block_1"] and "back" in progress.reused
    (plain,) = {path.parent for path in engines.glob("*/manifest.json")} - {folder}
    for name in ("back.onnx", "block_1.onnx"):
        same = (folder / name).read_bytes() == (plain / name).read_bytes()
        assert same == (name != "block_1.onnx")
    assert manifests.load(folder).complete and not list(folder.glob(".*.onnx*"))
    assert str(manifests.load(folder).lora[0]) == "style.safetensors:0.5"
    shown = json.loads(invoke("inspect", folder, "--json").stdout)["builds"][0]["lora"]
    assert [(one["name"], one["scale"]) for one in shown] == [("style.safetensors", 0.5)]
    again = Finished()
    assert build(LTX.goldens, engines, lora=[f"{lora}:0.5"], **options, progress=again) == [folder]
    assert not again.compiled
    check_calls(engines, folder, plain, lora, tmp_path, embeds)


def check_calls(engines: Path, folder: Path, plain: Path, lora: Path, tmp_path: Path, embeds: Path) -> None:
    """Each call finds the build with its LoRAs, and says which ones a build has where none fits."""
    for given, wanted in (((), plain), ((f"{lora}:0.5",), folder)):
        pipeline = VideoPipeline.from_pretrained(LTX.goldens, engines=engines, lora=given)
        assert pipeline.store.find(pipeline._request).folder == wanted
    shutil.rmtree(plain)
    messages: dict[tuple[str, ...], str] = {
        (): "built with lora style.safetensors:0.5, the request has none: give the build's own as lora=",
        (
            f"{lora}:0.7",
        ): "built with lora style.safetensors:0.5, the request has style.safetensors:0.7: give",
    }
    for other, message in messages.items():
        with pytest.raises(EngineRejected, match=message):
            VideoPipeline.from_pretrained(LTX.goldens, engines=engines, lora=other)
    call = ("generate", LTX.goldens, "--engines", engines, "--embeds", embeds, "--num-inference-steps=2")
    output = tmp_path / "x.safetensors"
    assert_one_line_error(invoke(*call, "--output", output), messages[()])
    result = invoke(*call, "--output", output, f"--lora={lora}:0.5")
    assert result.returncode == 0 and output.exists(), result.stderr
