"""The comparisons of `stg-trt verify`, without its processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

from stg_trt import build
from stg_trt.build_engines.compiler import BFLOAT16
from stg_trt.build_engines.engine_comparison import (
    REQUEST,
    Request,
    _compared,
    _run,
    compare_engines,
    random_inputs,
)
from stg_trt.build_engines.verify_command import verify
from stg_trt.engines import manifest as manifests
from stg_trt.engines.manifest import Manifest
from stg_trt.engines.store import Build
from stg_trt.errors import EngineRejected, InvalidRequest, StgTrtError
from stg_trt.models.workload import Workload
from tests.conftest import BuiltOnce
from tests.support.family_cases import LTX
from tests.support.tiny_graph import INPUT, OUTPUT, write_graph

pytest.importorskip("polygraphy", reason="needs the extra verify")

SMALL: dict[str, Any] = {**LTX.sizes, "stg_blocks": []}


@pytest.fixture
def copied(one_block: Path, built_once: BuiltOnce, tmp_path: Path) -> Path:
    """A build of one block for ONNX Runtime, alone in a folder that a test may change."""
    engines = built_once(
        "verified-engines", lambda folder: build(one_block, folder, **SMALL, verify_timesteps=0)
    )
    (source,) = (path.parent for path in engines.glob("*/manifest.json"))
    return Path(shutil.copytree(source, tmp_path / "engines" / source.name))


def rewrite(folder: Path, **changes: Any) -> Manifest:
    manifest = manifests.load(folder).model_copy(update=changes)
    manifests.save(manifest, folder)
    return manifest


def refused(folder: Path, checkpoint: Path | None = None) -> str:
    request = Request((folder,), None if checkpoint is None else str(checkpoint))
    with pytest.raises(StgTrtError) as caught:
        list(compare_engines(request))
    return str(caught.value)


def test_the_eager_model_is_needed_and_must_be_the_same(
    copied: Path, one_block: Path, tmp_path: Path
) -> None:
    assert "expected the one that segmented-" in refused(copied) and "give --checkpoint" in refused(copied)
    other = Path(shutil.copytree(one_block, tmp_path / "other"))
    config = other / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"norm_eps": 1e-06', '"norm_eps": 1e-05'))
    assert "got other weights: give that one, or build again from this" in refused(copied, other)


def test_a_damaged_engine_is_refused(copied: Path, one_block: Path) -> None:
    engine = copied / "text.onnx"
    engine.write_bytes(engine.read_bytes()[:-1] + b"\xff")
    assert "text.onnx: its contents changed after the build" in refused(copied, one_block)


def test_engines_that_cannot_run_here_are_left_out_with_the_reason(
    copied: Path,
) -> None:
    rewrite(copied, backend="tensorrt-rtx", target="sm_121")
    with pytest.raises(EngineRejected, match=r"verify: expected engines in .* that can be compared here"):
        verify(copied.parent)
    rewrite(copied, backend="inductor")
    with pytest.raises(EngineRejected, match="Polygraphy has no runner for inductor's engines"):
        verify(copied.parent)
    (copied.parent / "empty").mkdir()
    with pytest.raises(EngineRejected, match="got an empty folder: build first"):
        verify(copied.parent / "empty")


def test_an_engine_whose_graph_was_not_kept(copied: Path) -> None:
    rewrite(copied, backend="tensorrt", target="this-gpu")
    with pytest.raises(InvalidRequest, match=r"expected the graph .*/onnx/text.onnx, got .*: build again"):
        list(compare_engines(Request((copied,))))


@pytest.mark.slow(reason="starts a process that imports TensorRT-RTX")
def test_an_engine_that_does_not_load_is_said_in_one_line(copied: Path, tmp_path: Path) -> None:
    """TensorRT-RTX is given a file that is no plan."""
    pytest.importorskip("tensorrt_rtx", reason="needs the wheel of TensorRT-RTX")
    rewrite(copied, backend="tensorrt-rtx", target="sm_120")
    (copied / "onnx").mkdir()
    shutil.copyfile(copied / "text.onnx", copied / "onnx" / "text.onnx")
    question = tmp_path / "request.json"
    question.write_bytes(REQUEST.dump_json(Request((copied,))))
    child = subprocess.run(
        [sys.executable, "-m", "stg_trt.build_engines.engine_comparison", question, tmp_path / "answer.json"],
        env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 1 and "Traceback" not in child.stderr
    last = child.stderr.splitlines()[-1]
    assert last.startswith(
        f"stg-trt: {copied.name}: text: expected an engine that Polygraphy can run here, got "
    )
    assert last.endswith(": build the engines again here")


def test_each_runner_is_given_its_own_precision(copied: Path, tmp_path: Path) -> None:
    """A runner in bfloat16, as a TensorRT engine is, beside ONNX Runtime in float32."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.common import TensorMetadata
    from polygraphy.datatype import DataType

    graph = write_graph(tmp_path / "text.onnx")
    weight = torch.tensor(numpy_helper.to_array(onnx.load(graph).graph.initializer[0]))

    class Bfloat16Runner(BaseRunner):  # type: ignore[misc]
        def infer_impl(self, feed_dict: Any) -> Any:
            (tensor,) = feed_dict.values()
            assert tensor.dtype == torch.bfloat16
            self.inference_time = 0.0
            return OrderedDict({OUTPUT.name: tensor @ weight.bfloat16()})

        def get_input_metadata_impl(self) -> Any:
            return TensorMetadata().add(INPUT.name, DataType.BFLOAT16, (-1, 9, 24))

    manifest = rewrite(copied)
    record = manifest.segments[0].model_copy(update={"inputs": (INPUT,)})
    bf16 = manifest.model_copy(update={"workload": Workload(**LTX.sizes, precision="bf16")})
    compiled = Build(copied, bf16)
    runners = [Bfloat16Runner("bf16"), OnnxrtRunner(SessionFromOnnx(str(graph)))]
    results = _run(compiled, record, runners, [random_inputs(record, 3)])
    comparison = _compared(compiled, record, 3, "ONNX graph", results)
    assert comparison.limit == BFLOAT16 and comparison.limit.allows(comparison.found)
    assert 1e-4 < comparison.found.relative_l2 < 1e-2
