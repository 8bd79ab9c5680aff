"""A segment is built piece by piece: each is compared on its own input, and leaves memory before the next."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stg_trt import build
from stg_trt.build_engines import graph_weights
from stg_trt.build_engines.display import print_summary
from stg_trt.build_engines.reference import Reference, State
from stg_trt.build_engines.verify import worst
from stg_trt.engines import manifest as manifests
from stg_trt.engines.manifest import Verification
from stg_trt.errors import GateMissed
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.segment import Segment
from tests.support.family_cases import LTX

Build = Callable[[], list[Path]]


@pytest.fixture
def build_ltx(tmp_path: Path) -> Build:
    """All five blocks in one segment."""
    return lambda: build(LTX.goldens, tmp_path, **LTX.sizes, stg_blocks=[], verify_timesteps=1)


@pytest.mark.slow(reason="collects garbage before each piece of a build")
def test_one_piece_is_in_memory_at_a_time(build_ltx: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_weights, "_EMBEDDED_BYTES", 0)
    made: list[weakref.ref[SegmentModule]] = []
    alive: list[int] = []
    load = Reference.module

    def counted(self: Reference, segment: Segment, **options: Any) -> SegmentModule:
        gc.collect()
        alive.append(sum(module() is not None for module in made))
        module = load(self, segment, **options)
        held = {name.split(".")[0] for name, _ in module.named_parameters()}
        # A block's module has nothing of embedding and head.
        assert segment.has_ends or held == {"blocks"}
        made.append(weakref.ref(module))
        return module

    monkeypatch.setattr(Reference, "module", counted)
    build_ltx()
    # The text, the embedding, the blocks, the head.
    assert alive == [0] * (1 + 1 + 5 + 1)


def test_the_table_says_what_is_farthest(
    build_ltx: Build, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (folder,) = build_ltx()
    manifest = manifests.load(folder)
    (normal,) = manifest.segments[1].verification
    assert normal.piece in {"embedding", "head", *(f"block {number}" for number in range(5))}
    print_summary(folder, manifest)
    assert normal.piece in capsys.readouterr().out
    whole = normal.model_copy(update={"piece": None})
    segment = manifest.segments[1].model_copy(update={"verification": (whole,)})
    print_summary(folder, manifest.model_copy(update={"segments": (segment,)}))
    assert "whole segment" in capsys.readouterr().out


def test_a_wrong_block_is_named(build_ltx: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Reference.run

    def wrong_from_3(
        self: Reference, piece: Segment, module: SegmentModule
    ) -> tuple[list[State], list[State]]:
        inputs, outputs = run(self, piece, module)
        if piece.name == "block" and piece.start >= 3:
            outputs = [{name: 1.001 * tensor for name, tensor in state.items()} for state in outputs]
        return inputs, outputs

    monkeypatch.setattr(Reference, "run", wrong_from_3)
    with pytest.raises(GateMissed, match=r"^normal, block 3: numerics: expected relative L2 <= 0.0001 .*got"):
        build_ltx()


def test_of_all_pieces_the_farthest_is_recorded() -> None:
    near, far = (Verification(timestep=1.0, cosine=1, relative_l2=error, max_abs=0) for error in (1e-7, 1e-5))
    other = Verification(timestep=0.5, cosine=1, relative_l2=1e-6, max_abs=0)
    found = worst({"embedding": (near, other), "block 7": (far, near), "head": (near, near)})
    assert [(check.relative_l2, check.piece) for check in found] == [(1e-5, "block 7"), (1e-6, "embedding")]
    assert worst({"embedding": (), "head": ()}) == ()
