"""Pieces that are traced once between them: equal in all but weights, and never any others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from stg_trt.build_engines import compile_inductor
from stg_trt.build_engines.compile_inductor import ExportedChain, InductorCompiler
from stg_trt.build_engines.compiler import Job
from stg_trt.build_engines.piece_key import PieceKey
from stg_trt.build_engines.pieces import pieces_of
from stg_trt.build_engines.trace import Trace, trace
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.perturbation import Perturbation
from stg_trt.models.segment import Segment
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from tests.support.family_cases import CASES, COGVIDEOX, HUNYUAN_VIDEO, LTX, MOCHI, WAN, FamilyCase
from tests.support.inductor_compiler import compiler_of

X = TensorSpec("x", "float32", (ROWS, 4, 6))
# Embedding, kinds of blocks, head. Mochi's last block leaves the text alone; HunyuanVideo has two kinds.
KINDS = [(LTX, 3), (WAN, 3), (MOCHI, 4), (HUNYUAN_VIDEO, 4), (COGVIDEOX["5b"], 3)]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The segments of the traces that are made."""
    names: list[str] = []

    def recorded(name: str, *arguments: Any) -> Trace:
        names.append(name)
        return trace(name, *arguments)

    monkeypatch.setattr(compile_inductor, "trace", recorded)
    return names


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The segments of traces that would be made, each of another program."""
    names: list[str] = []

    def counts(name: str, *arguments: Any) -> Trace:
        names.append(name)
        return Trace(ExportedProgram.__new__(ExportedProgram), str(len(names)), frozenset(), {})

    monkeypatch.setattr(compile_inductor, "trace", counts)
    return names


def export(compiler: InductorCompiler, segment: Segment, folder: Path) -> ExportedChain:
    """The segment's pieces over weights that are loaded for each, as a build does it."""
    checkpoint, workload = compiler.options.checkpoint, compiler.options.workload
    family = checkpoint.family
    borders = tuple(family.inputs(segment, workload)), tuple(family.outputs(segment, workload))

    export = compiler.export(Job(segment, *borders, (1, 3, 6), folder, lambda phase: None))
    for piece in pieces_of(segment):
        transformer = checkpoint.load_transformer(piece.blocks, ends=piece.has_ends)
        export.append(piece, family.module(transformer, piece, expand_masks=False))
    return export.finish()


@pytest.mark.parametrize(("case", "kinds"), KINDS, ids=str)
def test_equal_blocks_are_traced_once(
    case: FamilyCase, kinds: int, tmp_path: Path, counted: list[str]
) -> None:
    compiler = compiler_of(case.goldens, tmp_path, "fp32", sizes=case.sizes)
    count = case.family.num_blocks
    exported = export(compiler, Segment("normal", 0, count, front=True, back=True), tmp_path)
    assert counted == ["normal"] * kinds and len(exported.programs) == kinds
    # A second segment of the same pieces needs no trace of its own, whatever the numbers of its blocks.
    again = export(compiler, Segment("back", 1, count, back=True), tmp_path)
    assert len(counted) == kinds and again.pieces == exported.pieces[2:]


@pytest.mark.slow(reason="exports pieces that are shared with nothing")
def test_what_is_exported_is_what_a_trace_of_every_piece_gives(
    tmp_path: Path, traced: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two last blocks of Mochi, which differ, and one before."""
    last = MOCHI.family.num_blocks
    segment = Segment("mid", last - 3, last, back=True)
    exported = export(compiler_of(MOCHI.goldens, tmp_path, "fp32", sizes=MOCHI.sizes), segment, tmp_path)
    assert len(traced) == 3
    of = PieceKey.of
    monkeypatch.setattr(PieceKey, "of", lambda *arguments: replace(of(*arguments), module=object()))
    each = export(compiler_of(MOCHI.goldens, tmp_path, "fp32", sizes=MOCHI.sizes), segment, tmp_path)
    assert len(traced) == 3 + 4
    assert each.pieces == exported.pieces and each.sha256 == exported.sha256
    assert each.weights.keys() == exported.weights.keys()
    assert all(torch.equal(each.weights[name], weight) for name, weight in exported.weights.items())


def key(case: FamilyCase, segment: Segment, max_rows: int = 6, **changes: Any) -> PieceKey:
    module = case.family.module(case.checkpoint.load_transformer(), segment, expand_masks=False)
    for name, value in changes.items():
        setattr(module, name, value)
    workload = case.workload
    borders = case.family.inputs(segment, workload), case.family.outputs(segment, workload)
    return PieceKey.of(module, *borders, max_rows)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_makes_a_piece_another(case: FamilyCase) -> None:
    block, skipped = Segment("block", 1, 2), Perturbation("stg-a", (1,))
    first = key(case, block)
    assert first == key(case, Segment("other", 2, 3)) and hash(first) == hash(key(case, block))
    others = [
        key(case, Segment("block", 1, 2, keep_input=True)),
        key(case, Segment("block", 1, 2, skipped=skipped)),
        key(case, Segment("block", 1, 3)),
        key(case, Segment("block", 1, 2, back=True)),
        key(case, block, max_rows=3),
        key(case, block, expand_masks=True),
        key(case, block, qk_norm_rope=print),
    ]
    assert len({first, *others}) == 1 + len(others)


class Piece(SegmentModule):
    """One of each kind of thing that a module can hold."""

    def __init__(self, change: Callable[[Any], object] = lambda piece: None) -> None:
        super().__init__(("x",), ("x",), False)
        self.linear, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("table", torch.arange(6.0))
        self.eps, self.sizes, self.options = 1e-6, [1, 2], {"mode": "fast"}
        self.activation = functools.partial(nn.functional.gelu, approximate="tanh")
        change(self)


@pytest.mark.parametrize(
    "change",
    [
        lambda piece: setattr(piece, "eps", 1e-5),
        lambda piece: setattr(piece, "sizes", [1, True]),
        lambda piece: setattr(piece, "options", {"mode": "exact"}),
        lambda piece: setattr(piece, "activation", functools.partial(nn.functional.gelu)),
        lambda piece: setattr(piece, "activation", nn.functional.gelu),
        lambda piece: setattr(piece, "table", piece.table.double()),
        lambda piece: setattr(piece, "other", nn.Linear(6, 6, bias=False)),
        lambda piece: setattr(piece, "other", nn.Linear(6, 7)),
        lambda piece: setattr(piece.other, "weight", piece.linear.weight),
        lambda piece: setattr(piece, "other", nn.LayerNorm(6)),
        lambda piece: piece.bfloat16(),
        lambda piece: piece.register_forward_hook(lambda *arguments: None),
    ],
)
def test_any_other_content_is_another_piece(change: Callable[[Any], object]) -> None:
    same, other = (PieceKey.of(Piece(), (X,), (X,), 6) for _ in range(2))
    assert same == other and hash(same) == hash(other)
    assert PieceKey.of(Piece(change), (X,), (X,), 6) != same


@pytest.mark.parametrize("content", [torch.ones(6), torch.Generator(), lambda: None, [nn.Linear(2, 2)]])
def test_what_is_not_understood_is_equal_to_nothing(content: Any) -> None:
    def hold(piece: Any) -> None:
        # A lambda is another function wherever it is written.
        piece.content = (lambda: None) if callable(content) else content

    first, second = (PieceKey.of(Piece(hold), (X,), (X,), 6) for _ in range(2))
    assert first != second


def test_a_piece_that_holds_itself_is_read() -> None:
    piece = Piece(lambda piece: piece.options.update(self=piece.options))
    assert PieceKey.of(piece, (X,), (X,), 6) != PieceKey.of(Piece(), (X,), (X,), 6)
