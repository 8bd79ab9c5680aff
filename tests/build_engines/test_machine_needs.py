"""A machine that is too small for a build is told so before the work starts."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import psutil
import pytest

from stg_trt import build
from stg_trt.build_engines.build import Reference
from stg_trt.build_engines.machine_needs import MachineNeeds
from stg_trt.build_engines.options import BuildOptions
from stg_trt.engines.backends import backend_for
from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.segment import Segment
from stg_trt.models.workload import Workload
from stg_trt.system.units import GIB
from tests.support.family_cases import CASES, LTX, FamilyCase

Disk = namedtuple("Disk", "free")
Memory = namedtuple("Memory", "available total")
Swap = namedtuple("Swap", "free")


def has(monkeypatch: pytest.MonkeyPatch, disk: int = 1 << 50, memory: int = 1 << 50, swap: int = 0) -> None:
    """The machine has these bytes free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(disk))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(memory, memory))
    monkeypatch.setattr(psutil, "swap_memory", lambda: Swap(swap))


def options_of(case: FamilyCase) -> BuildOptions:
    """A build of a family's goldens, uncut."""
    return BuildOptions(
        checkpoint=case.checkpoint,
        output=Path("engines"),
        workload=case.workload,
        skips={},
        stg_mode="stg-a",
        layout="segmented",
        max_batch=1,
        backend=backend_for("onnxruntime"),
        targets=("cpu",),
        verify_timesteps=1,
        keep_onnx=False,
    )


def needs(backend: str, precision: str, output: Path = Path("engines"), **targets: int) -> MachineNeeds:
    """Of Wan 1.3B, cut before its last ten blocks."""
    options = BuildOptions(
        checkpoint=Checkpoint.open("wan2.1-t2v-1.3b", random_weights=True),
        output=output,
        workload=Workload(480, 832, 81, 512, precision),
        skips={"skip": (19,)},
        stg_mode="stg-r",
        layout="segmented",
        max_batch=1,
        backend=backend_for(backend),
        targets=("cpu",) if backend == "onnxruntime" else ("sm_120",),
        verify_timesteps=1,
        keep_onnx=False,
    )
    return MachineNeeds(options, {s: targets[s.name] for s in options.segments if s.name in targets})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_weight_is_counted_once(case: FamilyCase) -> None:
    counted = options_of(case).block_values
    whole = case.checkpoint.load_transformer()
    assert counted.total() == sum(weight.numel() for weight in whole.state_dict().values())
    assert {*counted} <= {None, *range(case.family.num_blocks)} and len(counted) > case.family.num_blocks


def test_engines_take_the_disk_and_the_largest_of_them_the_memory() -> None:
    block = needs("tensorrt-rtx", "bf16").options.block_values[0]
    whole = needs("tensorrt-rtx", "bf16", text=1, front=1, block_19=1, back=1)
    assert whole.disk_bytes == 2 * 30 * block and whole.memory_bytes == 2 * 19 * block
    # An engine for each target, compiled one by one.
    two = needs("tensorrt-rtx", "bf16", front=2, back=1)
    assert two.disk_bytes == 2 * (2 * 19 + 10) * block and two.memory_bytes == whole.memory_bytes
    # A block in float32 and bfloat16; in float32 alone.
    assert needs("tensorrt-rtx", "bf16", block_19=1).memory_bytes == 6 * block
    alone = needs("onnxruntime", "fp32", front=1, back=1)
    assert alone.memory_bytes == 4 * block and alone.disk_bytes == 4 * 29 * block
    assert needs("tensorrt-rtx", "bf16").disk_bytes == needs("tensorrt-rtx", "bf16").memory_bytes == 0


def test_what_is_needed_and_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = needs("tensorrt-rtx", "bf16", tmp_path / "new" / "engines", front=1, block_19=1, back=1)
    has(monkeypatch, whole.disk_bytes, whole.memory_bytes // 2, whole.memory_bytes - whole.memory_bytes // 2)
    whole.check()
    has(monkeypatch, disk=GIB // 2)
    message = (
        rf"^disk: expected at least 2\.6 GiB free in {tmp_path} for the engines, got 0\.5 GiB: free some"
    )
    with pytest.raises(InvalidRequest, match=message):
        whole.check()
    has(monkeypatch, memory=GIB // 2, swap=GIB // 4)
    with pytest.raises(
        InvalidRequest, match=r"^memory: expected at least 1\.6 GiB .* got 0\.8 GiB: end other"
    ):
        whole.check()


def test_only_what_is_missing_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A refused build has loaded no weights and leaves nothing; a finished one needs nothing."""

    def build_ltx(**options: Any) -> list[Path]:
        shared: dict[str, Any] = {**LTX.sizes, "stg_blocks": [], "verify_timesteps": 0}
        return build(LTX.goldens, tmp_path / "engines", **shared, **options)

    has(monkeypatch, disk=10)
    with monkeypatch.context() as patched:
        patched.setattr(Reference, "module", lambda *arguments, **options: pytest.fail("a module is loaded"))
        with pytest.raises(InvalidRequest, match="disk: expected at least"):
            build_ltx()
    assert not [*tmp_path.iterdir()]
    has(monkeypatch)
    built = build_ltx()
    has(monkeypatch, disk=10, memory=10)
    assert build_ltx() == built


def test_segments_without_blocks_are_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, disk=0, memory=0)
    text = MachineNeeds(needs("onnxruntime", "fp32").options, {Segment("text", text=True): 1})
    text.check()
