"""Weight files in every form that people have: variants, shards, pointers, quantised ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from tests.support.family_cases import CASES, LTX, FamilyCase

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return copied(LTX, tmp_path / "model")


def copied(case: FamilyCase, folder: Path) -> Path:
    for part in ("transformer", "scheduler"):
        shutil.copytree(case.goldens / part, folder / part)
    return folder


def add(name: str, tensor: Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


def as_int8(tensors: Tensors) -> None:
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name] = tensors[name].to(torch.int8)


BLOCK = "transformer_blocks.0.attn1.to_q."
QUANTISED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "nf4": (add(f"{BLOCK}weight.absmax", torch.zeros(4)), "4-bit weights of .*absmax: .*dequantize"),
    "int8 of bitsandbytes": (add(f"{BLOCK}SCB", torch.zeros(4)), "8-bit weights of .*: .*dequantize"),
    "int8": (as_int8, r"quantised weights \(I8 .*\): .*dequantize"),
    "gptq": (add(f"{BLOCK}qweight", torch.zeros(4, dtype=torch.int32)), "GPTQ or AWQ .*dequantize"),
    "scaled fp8": (add(f"{BLOCK}scale_weight", torch.ones(1)), "scaled fp8 weights, .*: use the original's"),
    "marked fp8": (add("scaled_fp8", torch.zeros(2)), "scaled fp8 weights, .*: use the original's"),
    "unfused lora": (add(f"{BLOCK}lora_A.default.weight", torch.zeros(2, 4)), "a LoRA .*--lora FILE"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", QUANTISED)
def test_what_is_not_plain_is_refused_with_its_cause(case: FamilyCase, kind: str, tmp_path: Path) -> None:
    change, pattern = QUANTISED[kind]
    folder = copied(case, tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(InvalidRequest, match=f"checkpoint: expected plain weights in .*, got {pattern}"):
        Checkpoint.open(folder)


def test_quantised_metadata_is_refused(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"_quantization_metadata": "{}"})
    with pytest.raises(InvalidRequest, match=r"got quantised weights .*: use the original's weights in bf16"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "gguf", "modelopt"])
def test_a_quantised_configuration_is_refused(folder: Path, method: str) -> None:
    path = folder / "transformer/config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": method}})
    )
    message = rf"got a quantization_config \({method}\): load it with .*dequantize\(\)"
    with pytest.raises(InvalidRequest, match=message):
        Checkpoint.open(folder)
    assert Checkpoint.open(folder, random_weights=True).fingerprint()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_plain_numbers_of_every_type_are_read_exactly(folder: Path, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(stored, folder / WEIGHTS)
    checkpoint = Checkpoint.open(folder)
    checkpoint.check()
    for name, tensor in checkpoint.load_transformer().state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, stored[name].float())


def test_a_pointer_is_named(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")
    with pytest.raises(
        InvalidRequest, match=r"expected the contents of .*, got a Git LFS pointer .*lfs pull"
    ):
        Checkpoint.open(folder)


def test_pickles_are_named(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "transformer/diffusion_pytorch_model.bin")
    with pytest.raises(
        InvalidRequest, match=r"safetensors format in transformer/, got .*\.bin: load .*save_"
    ):
        Checkpoint.open(folder)


@pytest.mark.parametrize("shard_size", ["10GB", "100KB"])
def test_a_variant_is_chosen_by_its_name(folder: Path, shard_size: str) -> None:
    model = LTX.model_class.from_pretrained(folder, subfolder="transformer").half()
    shutil.rmtree(folder / "transformer")
    model.save_pretrained(folder / "transformer", variant="fp16", max_shard_size=shard_size)
    message = r"got only the variant fp16: add --variant fp16 \(variant='fp16' in Python\)"
    with pytest.raises(InvalidRequest, match=message):
        Checkpoint.open(folder)
    with pytest.raises(InvalidRequest, match=r"variant: expected one that .* \(fp16\), got 'bf16': leave"):
        Checkpoint.open(folder, variant="bf16")
    loaded = Checkpoint.open(folder, variant="fp16").load_transformer()
    assert_same(loaded, model)


def test_the_variant_comes_before_the_plain_weights(folder: Path) -> None:
    plain = LTX.model_class.from_pretrained(folder, subfolder="transformer")
    half = LTX.model_class.from_pretrained(folder, subfolder="transformer").half()
    half.save_pretrained(folder / "transformer", variant="fp16")
    assert_same(Checkpoint.open(folder, variant="fp16").load_transformer(), half)
    assert_same(Checkpoint.open(folder).load_transformer(), plain)
    assert Checkpoint.open(folder).fingerprint() != Checkpoint.open(folder, variant="fp16").fingerprint()


def assert_same(model: Any, expected: Any) -> None:
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.float()), name
