"""`stg-trt verify`, on a real small build and on one whose engine is another model's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from stg_trt import build
from stg_trt.engines import manifest as manifests
from stg_trt.engines.manifest import FileRecord
from stg_trt.engines.store import EngineStore
from stg_trt.system.files import file_sha256
from tests.conftest import BuiltOnce
from tests.support.cli import invoke, run
from tests.support.family_cases import LTX
from tests.support.tiny_graph import write_graph

pytest.importorskip("polygraphy", reason="needs the extra verify")

pytestmark = pytest.mark.slow(reason="compares engines in a process of its own")

SMALL: dict[str, Any] = {**LTX.sizes, "stg_blocks": []}


@pytest.fixture(scope="module")
def engines(one_block: Path, built_once: BuiltOnce) -> Path:
    return built_once(
        "verified-engines", lambda folder: build(one_block, folder, **SMALL, verify_timesteps=0)
    )


@pytest.fixture
def copied(engines: Path, tmp_path: Path) -> Path:
    """The one build, alone in a folder that a test may change."""
    (source,) = (path.parent for path in engines.glob("*/manifest.json"))
    return Path(shutil.copytree(source, tmp_path / "engines" / source.name))


def test_engines_that_compute_what_the_model_does(engines: Path, one_block: Path) -> None:
    result = run("verify", engines, "--checkpoint", one_block)
    assert result.returncode == 0, result.stderr
    (build_folder,) = EngineStore.open(engines).builds
    assert build_folder.folder.name in result.stdout
    rows = [line for line in result.stdout.splitlines() if "eager float32" in line]
    assert ["text" in rows[0], "normal" in rows[1]] == [True, True]
    assert all("equal" in row and "DIFFERS" not in row for row in rows)


def test_an_engine_of_another_model_is_noticed(copied: Path, one_block: Path, tmp_path: Path) -> None:
    """The manifest is written anew, as if that engine had been built: only what it computes tells."""
    manifest = manifests.load(copied)
    text = manifest.record("text")
    assert text is not None
    other = write_graph(tmp_path / "other.onnx", tokens=LTX.sizes["text_length"])
    engine = copied / text.files[0].name
    shutil.copyfile(other, engine)
    file = FileRecord(name=engine.name, bytes=engine.stat().st_size, sha256=file_sha256(engine))
    records = tuple(
        record.model_copy(update={"files": (file,)}) if record is text else record
        for record in manifest.segments
    )
    manifests.save(manifest.model_copy(update={"segments": records}), copied)
    result = invoke("verify", copied.parent, "--checkpoint", one_block)
    assert result.returncode == 1
    assert "DIFFERS" in result.stdout and "equal" in result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        "stg-trt: verify: expected relative L2 <= 1e-04 against the eager float32, got "
    ) and line.endswith(f" for text of {copied.name}, 1 of 2 engines differ: build them again")
