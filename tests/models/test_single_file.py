"""A transformer in one file: the original code's names, diffusers' names, GGUF."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from tests.support.family_cases import CASES, HUNYUAN_VIDEO, LTX, MOCHI, FamilyCase
from tests.support.original_names import ORIGINAL, original_name

Tensors = dict[str, Tensor]


def in_folder(case: FamilyCase, folder: Path) -> Path:
    """The configurations of a tiny checkpoint, without weights, for a file beside them."""
    for part in ("transformer", "scheduler"):
        shutil.copytree(case.goldens / part, folder / part, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def weights_of(case: FamilyCase) -> Tensors:
    tensors: Tensors = load_file(case.goldens / "transformer" / "diffusion_pytorch_model.safetensors")
    return tensors


def original(case: FamilyCase) -> Tensors:
    """As in files of the original code: under a prefix, beside tensors of the VAE."""
    named = {original_name(case, name): tensor for name, tensor in weights_of(case).items()}
    prefix = "model.diffusion_model."
    return {f"{prefix}{name}": tensor for name, tensor in named.items()}


def assert_same(checkpoint: Checkpoint, expected: Tensors) -> None:
    checkpoint.check()
    found = checkpoint.load_transformer().state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], tensor.float()), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_file_in_the_names_of_diffusers(case: FamilyCase, tmp_path: Path) -> None:
    path = in_folder(case, tmp_path / "model") / "model-bf16.safetensors"
    stored = {name: tensor.bfloat16() for name, tensor in weights_of(case).items()}
    save_file(stored, path)
    checkpoint = Checkpoint.open(path)
    assert_same(checkpoint, stored)
    assert checkpoint.name == "model-bf16" and not checkpoint.has_text_encoder


def test_the_file_inside_a_folder(ltx_checkpoint: Path) -> None:
    path = ltx_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    assert_same(Checkpoint.open(path), weights_of(LTX))
    assert Checkpoint.open(path).fingerprint() == Checkpoint.open(ltx_checkpoint).fingerprint()


@pytest.mark.parametrize("case", ORIGINAL, ids=str)
def test_a_file_in_the_names_of_the_original(case: FamilyCase, tmp_path: Path) -> None:
    path = in_folder(case, tmp_path / "model") / "original.safetensors"
    save_file(original(case) | ({"vae.decoder.weight": torch.zeros(3)} if case is LTX else {}), path)
    checkpoint = Checkpoint.open(path)
    assert_same(checkpoint, weights_of(case))
    block = checkpoint.load_transformer([1])
    on_meta = {checkpoint.family.block_of(name) for name, p in block.named_parameters() if p.is_meta}
    assert 1 not in on_meta and None not in on_meta and 0 in on_meta
    before = checkpoint.fingerprint()
    save_file({name: tensor + 1 for name, tensor in original(case).items()}, path)
    assert Checkpoint.open(path).fingerprint() != before


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16", "F16"])
@pytest.mark.parametrize("case", ORIGINAL, ids=str)
def test_gguf(case: FamilyCase, kind: str, tmp_path: Path) -> None:
    """Each value is what the format says: scale times integer, or the shorter float."""
    path = in_folder(case, tmp_path / "model") / f"model-{kind}.gguf"
    expected = write_gguf(path, weights_of(case), lambda name: original_name(case, name), kind)
    assert_same(Checkpoint.open(path), expected)


def write_gguf(path: Path, tensors: Tensors, rename: Callable[[str], str], kind: str) -> Tensors:
    """Matrices of whole blocks quantised, the others in float32; returns the values that the file holds."""
    wanted = gguf.GGMLQuantizationType[kind]
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    writer = gguf.GGUFWriter(path, "tiny")
    held: Tensors = {}
    for name, tensor in tensors.items():
        array = tensor.float().numpy()
        fits = array.ndim == 2 and array.shape[1] % block == 0
        data = gguf.quants.quantize(array, wanted) if fits else array
        held[name] = torch.from_numpy(gguf.quants.dequantize(data, wanted) if fits else array)
        writer.add_tensor(rename(name), data, raw_dtype=wanted if fits else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = in_folder(LTX, tmp_path / "model") / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        InvalidRequest, match=r"the Python module gguf to read .*: pip install 'stg-trt\[gguf\]'"
    ):
        Checkpoint.open(path)


@pytest.mark.parametrize("kept", [0, 3, 100, 2000])
def test_a_gguf_file_that_is_cut_short(tmp_path: Path, kept: int) -> None:
    path = in_folder(LTX, tmp_path / "model") / "model.gguf"
    write_gguf(path, weights_of(LTX), lambda name: original_name(LTX, name), "Q8_0")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        InvalidRequest, match=r"expected a whole GGUF file, got .*model\.gguf .*: download it"
    ):
        Checkpoint.open(path)


@pytest.mark.parametrize("case", [MOCHI, HUNYUAN_VIDEO], ids=str)
def test_a_file_that_cannot_be_converted(case: FamilyCase, tmp_path: Path) -> None:
    path = in_folder(case, tmp_path / "model") / "model.safetensors"
    save_file({"blocks.0.attn.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(InvalidRequest, match=r"checkpoint: expected .*") as refused:
        Checkpoint.open(path).check()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "x.safetensors",
            "expected a file of a model that diffusers knows, got .*: put it into the diffusers",
        ),
        ("x.ckpt", "expected a folder or a file ending in .safetensors or .gguf, got .*ckpt: give one"),
    ],
)
def test_a_file_of_no_known_model(tmp_path: Path, name: str, message: str) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / name)
    with pytest.raises(InvalidRequest, match=message):
        Checkpoint.open(tmp_path / name)


def test_quantised_files_are_refused_with_the_cause(tmp_path: Path) -> None:
    path = in_folder(LTX, tmp_path / "model") / "model.safetensors"
    save_file(original(LTX) | {"model.diffusion_model.x.scale_weight": torch.ones(1)}, path)
    with pytest.raises(InvalidRequest, match=r"got scaled fp8 weights, .*: use the original's weights"):
        Checkpoint.open(path)
