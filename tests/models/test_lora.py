"""LoRAs on every family: merged exactly, told apart by segment, refused where they cannot be merged whole."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.lora import Lora
from stg_trt.models.segment import TEXT, cut
from tests.support.family_cases import LTX, FamilyCase
from tests.support.tiny_lora import save_lora

# alpha / rank of the tiny LoRAs, if their file says it.
STRENGTH = 2.0


@pytest.fixture(scope="module")
def lora(case: FamilyCase, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Of block 1, and the names of its layers."""
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    return path, save_lora(case, case.goldens, path, 1)


@pytest.fixture(scope="module")
def ltx_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_lora(LTX, LTX.goldens, path, 1)
    return path


def test_the_merged_weights(case: FamilyCase, lora: tuple[Path, list[str]]) -> None:
    path, layers = lora
    matrices = load_file(path)
    plain = Checkpoint.open(case.goldens).load_transformer().state_dict()
    checkpoint = Checkpoint.open(case.goldens, lora=[f"{path}:0.5"])
    checkpoint.check()
    merged = checkpoint.load_transformer().state_dict()
    assert merged.keys() == plain.keys()
    for name, tensor in plain.items():
        layer = name.removesuffix(".weight")
        expected = tensor
        if layer in layers:
            down, up = (matrices[f"transformer.{layer}.lora_{part}.weight"] for part in "AB")
            expected = tensor + 0.5 * STRENGTH * (up @ down)
            assert (expected - tensor).abs().max() > 1e-3
        assert torch.allclose(merged[name], expected, atol=1e-6), name
    part = checkpoint.load_transformer([1]).state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in part.items() if not tensor.is_meta)
    other = checkpoint.load_transformer([0]).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in other.items() if not tensor.is_meta)


def test_without_notes_the_alpha_is_the_rank(tmp_path: Path) -> None:
    """As diffusers reads such a file."""
    for name, notes in (("with", True), ("without", False)):
        save_lora(LTX, LTX.goldens, tmp_path / f"{name}.safetensors", 1, notes=notes)
    scaled = {"with": 0.5, "without": 0.5 * STRENGTH}
    models = [
        Checkpoint.open(LTX.goldens, lora=[f"{tmp_path / name}.safetensors:{scale}"])
        .load_transformer()
        .state_dict()
        for name, scale in scaled.items()
    ]
    assert all(torch.allclose(models[0][name], models[1][name], atol=1e-6) for name in models[0])


def test_only_segments_with_changed_weights_have_other_fingerprints(
    case: FamilyCase, lora: tuple[Path, list[str]], tmp_path: Path
) -> None:
    plain, merged = Checkpoint.open(case.goldens), Checkpoint.open(case.goldens, lora=[lora[0]])
    segments = (TEXT, *cut("segmented", plain.family.num_blocks, "stg-r", (1, 2)))
    changed = [one.name for one in segments if one_changed(one, plain, merged)]
    assert changed == [one.name for one in segments if 1 in one.blocks]
    save_lora(case, case.goldens, tmp_path / "ends.safetensors", None)
    ends = Checkpoint.open(case.goldens, lora=[tmp_path / "ends.safetensors"])
    changed = [one.name for one in segments if one_changed(one, plain, ends)]
    assert changed == [one.name for one in segments if one.front or one.back or one.text]


def one_changed(segment: Any, plain: Checkpoint, merged: Checkpoint) -> bool:
    return plain.segment_fingerprint(segment) != merged.segment_fingerprint(segment)


def test_weights_outside_of_blocks_are_those_of_the_ends(case: FamilyCase) -> None:
    """On which the fingerprints of segments rely."""
    family = case.family
    model = case.checkpoint.load_transformer()
    for segment in cut("segmented", family.num_blocks, "stg-r", (1, 2)):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        module = family.module(model, segment, expand_masks=False)
        layers = (layer for layer in module.modules() if isinstance(layer, torch.nn.Linear))
        used = {names[id(layer.weight)] for layer in layers}
        blocks = {family.block_of(name) for name in used}
        assert blocks - {None} == set(segment.blocks)
        assert segment.front or segment.back or None not in blocks


def test_several_add_up_in_any_order(ltx_lora: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.safetensors"
    save_lora(LTX, LTX.goldens, second, 2, seed=1)
    texts = [f"{ltx_lora}:0.5", f"{second}:-1"]
    one, other = (Checkpoint.open(LTX.goldens, lora=order) for order in (texts, texts[::-1]))
    assert one.applied_lora == other.applied_lora and len(one.applied_lora) == 2
    assert str(next(a for a in one.applied_lora if a.scale < 0)) == "second.safetensors:-1"
    models = [checkpoint.load_transformer().state_dict() for checkpoint in (one, other)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    singles = [Checkpoint.open(LTX.goldens, lora=[text]).load_transformer().state_dict() for text in texts]
    plain = Checkpoint.open(LTX.goldens).load_transformer().state_dict()
    for name, tensor in models[0].items():
        assert torch.allclose(tensor, singles[0][name] + singles[1][name] - plain[name], atol=1e-5), name


def test_scales(ltx_lora: Path, tmp_path: Path) -> None:
    colon = ltx_lora.rename(tmp_path / "with:0.5.safetensors")
    assert Checkpoint.open(LTX.goldens, lora=[colon]).applied_lora[0].scale == 1
    assert Checkpoint.open(LTX.goldens, lora=[f"{colon}:0.25"]).applied_lora[0].scale == 0.25
    assert Checkpoint.open(LTX.goldens, lora=[f"{colon}:0"]).applied_lora == ()
    colon.rename(ltx_lora)
    for text in (tmp_path / "none", __file__, f"{ltx_lora}:nan", f"{ltx_lora}:much", ""):
        with pytest.raises(
            InvalidRequest, match=r"lora: expected FILE.safetensors or FILE.safetensors:SCALE, got"
        ):
            Checkpoint.open(LTX.goldens, lora=[text])


def test_a_text_names_the_file_from_anywhere(
    ltx_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    shutil.copy(ltx_lora, "a.safetensors")
    for given, scale, expert in (
        ("a.safetensors", 1, 0),
        ("a.safetensors:0.8", 0.8, 0),
        ("transformer_2=a.safetensors:-1", -1, 1),
    ):
        text = Lora.parse(given).text
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert Lora.parse(text) == Lora(tmp_path / "a.safetensors", scale, expert)
        monkeypatch.chdir(tmp_path)


def test_the_scale_counts(ltx_lora: Path) -> None:
    segment = cut("segmented", LTX.family.num_blocks, "stg-r", (1,))[1]
    found = [Checkpoint.open(LTX.goldens, lora=[f"{ltx_lora}:{scale}"]) for scale in (0.5, 1, 1.0)]
    assert len({one.segment_fingerprint(segment) for one in found}) == 2


def test_random_weights_take_none(ltx_lora: Path) -> None:
    for name in (LTX.goldens, "ltx-video-2b"):
        with pytest.raises(InvalidRequest, match="lora: expected a checkpoint with weights to merge it into"):
            Checkpoint.open(name, random_weights=True, lora=[ltx_lora])


FIRST = "transformer.transformer_blocks.1.attn1.to_q.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"text_encoder.x.lora_A.weight": torch.zeros(2, 2)}),
            "got text_encoder.x.lora_A",
        ),
        (
            lambda t: t.update({FIRST.replace(".1.", ".9."): t[FIRST] + 1}),
            "blocks.9.*which the transformer has not",
        ),
        (lambda t: t.update({FIRST: torch.zeros(4, 7)}), r"lora_A.weight of size 7 instead of 32"),
        (
            lambda t: t.update({FIRST.replace("lora_A.weight", "dora_scale"): torch.ones(32)}),
            r"got a DoRA \(",
        ),
        (lambda t: t.clear(), "got (no matrices|one that diffusers cannot read)"),
    ],
    ids=["text encoder", "other block", "other width", "DoRA", "empty"],
)
def test_what_cannot_be_merged_whole_is_refused(
    ltx_lora: Path, tmp_path: Path, change: Any, message: str
) -> None:
    tensors = load_file(ltx_lora)
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    expected = f"lora: expected .*x.safetensors with low-rank matrices of this transformer alone, .*{message}"
    with pytest.raises(InvalidRequest, match=expected) as refused:
        Checkpoint.open(LTX.goldens, lora=[tmp_path / "x.safetensors"]).check()
    assert "\n" not in str(refused.value)


def test_a_file_that_is_cut_short_is_refused(ltx_lora: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(ltx_lora.read_bytes()[:-9])
    with pytest.raises(InvalidRequest, match=r"lora: expected .*, got no whole safetensors file \("):
        Checkpoint.open(LTX.goldens, lora=[tmp_path / "x.safetensors"]).check()


def test_a_missing_extra_is_named(ltx_lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    checkpoint = Checkpoint.open(LTX.goldens, lora=[ltx_lora])
    with pytest.raises(
        InvalidRequest, match=r"lora: expected the Python module peft, got none: .*stg-trt\[lora"
    ):
        checkpoint.check()
