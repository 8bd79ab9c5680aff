"""Text encoders, tokenizers and VAEs that would make a wrong video, on every family: refused before it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.runtime.components import Components
from tests.support.family_cases import FamilyCase
from tests.support.whole_pipelines import PROMPTS, TEXT_LENGTH

CPU = torch.device("cpu")
Damage = Callable[[Path], object]


def change_tensors(part: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    (path,) = part.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})


def drop_tensor(part: Path) -> None:
    """One that no other is tied to."""
    change_tensors(part, lambda tensors: tensors.pop(sorted(tensors)[len(tensors) // 2]))


def reshape_tensor(part: Path) -> None:
    change_tensors(part, lambda tensors: tensors.update({sorted(tensors)[0]: torch.zeros(5, 5, 5)}))


def add_block(part: Path) -> None:
    """As a file of more blocks than the configuration counts."""

    def add(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in sorted(tensors) if ".0." in name)
        tensors[name.replace(".0.", ".7.", 1)] = tensors[name].clone()

    change_tensors(part, add)


def rewrite(path: Path, data: bytes) -> None:
    """The file may be a link to one that other tests share."""
    path.unlink()
    path.write_bytes(data)


def edit_config(part: Path, **entries: Any) -> None:
    config = json.loads((part / "config.json").read_text())
    rewrite(part / "config.json", json.dumps(config | entries).encode())


def cut_short(part: Path) -> None:
    (path,) = part.glob("*.safetensors")
    rewrite(path, path.read_bytes()[:-100])


def leave_pointer(part: Path) -> None:
    (path,) = part.glob("*.safetensors")
    rewrite(path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")


def quantize(part: Path) -> None:
    edit_config(part, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def widen(part: Path) -> None:
    """Another model's text encoder, whole in itself."""
    import transformers

    config = transformers.T5Config(vocab_size=64, d_model=40, d_kv=8, d_ff=8, num_layers=1, num_heads=2)
    model = transformers.T5EncoderModel(config)
    shutil.rmtree(part)
    model.save_pretrained(part)
    index = json.loads((part.parent / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "T5EncoderModel"]
    rewrite(part.parent / "model_index.json", json.dumps(index).encode())


def forget_words(part: Path) -> None:
    (part / "tokenizer.json").unlink()


def without_words(part: Path) -> None:
    """A tokenizer.json that is whole and empty."""
    data = json.loads((part / "tokenizer.json").read_text())
    special = {token["content"] for token in data["added_tokens"]}
    vocab = data["model"]["vocab"]
    if isinstance(vocab, list):
        data["model"]["vocab"] = [piece for piece in vocab if piece[0] in special]
    else:
        data["model"]["vocab"] = {word: id for word, id in vocab.items() if word in special}
        data["model"]["merges"] = []
    rewrite(part / "tokenizer.json", json.dumps(data).encode())


def foreign_words(part: Path) -> None:
    """Of a model with a larger vocabulary."""
    data = json.loads((part / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    if isinstance(vocab, list):
        vocab += [[f"\u2581word{i}", -1.0] for i in range(400)]
    else:
        vocab |= {f"word{i}": len(vocab) + i for i in range(400)}
    rewrite(part / "tokenizer.json", json.dumps(data).encode())


MODELS: dict[str, tuple[Damage, str]] = {
    "missing": (shutil.rmtree, "expected ({part}/ in .*, got no such folder|a VAE .*, got no {part}/con)"),
    "missing tensor": (drop_tensor, r"expected the weights of {part}/config.json, got none of the name \S+"),
    "other shape": (reshape_tensor, "expected a whole {part}/, got .*: download it again"),
    "more blocks": (add_block, "expected the weights of {part}/config.json, got also .*7.*: the folder"),
    "cut short": (cut_short, "expected a whole safetensors file, got .*{part}.*: download it again"),
    "pointer": (leave_pointer, "expected the contents of .*{part}.*, got a Git LFS pointer .*: run git"),
    "quantised": (quantize, r"expected plain weights in .*{part}/config.json, got a quantization_config "
                  r"\(bitsandbytes\): load it with the library .* dequantize\(\) and save_pretrained"),
}  # fmt: skip
TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "missing": (shutil.rmtree, "expected {part}/ in .*, got no such folder: download the whole"),
    "no file": (forget_words, r"expected tokenizer.json or .* in {part}/, .* got no .*: download it again"),
    "no words": (
        without_words,
        "expected a (whole|tokenizer with words in) {part}/, got .*: download it again",
    ),
    "foreign": (
        foreign_words,
        "expected words of {part}/ below .*, got word .*: the folder mixes",
    ),
}


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy whose files are links until a test replaces them."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model", copy_function=os.link))


def refusal(case: FamilyCase, folder: Path, *, text: bool) -> str:
    """The one line that loading answers; the other side of the pipeline loads all the same."""
    workload = replace(case.workload, text_length=TEXT_LENGTH)
    components = Components(Checkpoint.open(folder), dtype=None, offload=False)
    sides = [components.load_text, components.load_vae]
    wrong, right = sides if text else sides[::-1]
    right(workload, CPU)
    with pytest.raises(InvalidRequest) as refused:
        wrong(workload, CPU)
    message = str(refused.value)
    assert "\n" not in message and message.startswith("checkpoint: ")
    return message


@pytest.mark.parametrize("damage", MODELS)
def test_a_damaged_model_is_refused(case: FamilyCase, damaged: Path, damage: str) -> None:
    change, pattern = MODELS[damage]
    parts = [path.name for path in damaged.iterdir() if path.name.startswith(("text_encoder", "vae"))]
    for part in sorted(parts):
        kept = damaged / "kept"
        shutil.copytree(damaged / part, kept, copy_function=os.link)
        if damage == "more blocks" and not any(".0." in n for n in _names(damaged / part)):
            shutil.rmtree(kept)
            continue
        change(damaged / part)
        assert_matches(refusal(case, damaged, text=part != "vae"), pattern.format(part=part))
        shutil.rmtree(damaged / part, ignore_errors=True)
        kept.rename(damaged / part)


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_damaged_tokenizer_is_refused(case: FamilyCase, damaged: Path, damage: str) -> None:
    change, pattern = TOKENIZERS[damage]
    for part in sorted(path.name for path in damaged.glob("tokenizer*")):
        kept = damaged / "kept"
        shutil.copytree(damaged / part, kept, copy_function=os.link)
        change(damaged / part)
        assert_matches(refusal(case, damaged, text=True), pattern.format(part=part))
        shutil.rmtree(damaged / part, ignore_errors=True)
        kept.rename(damaged / part)


def test_foreign_widths_are_refused(case: FamilyCase, damaged: Path) -> None:
    widen(damaged / "text_encoder")
    message = refusal(case, damaged, text=True)
    assert_matches(message, r"expected text_encoder/ with embeddings of width \d+, as .*, got 40: the folder")


def test_foreign_latents_are_refused(
    case: FamilyCase, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(damaged)
    shape = checkpoint.family.latent_shape(case.workload)
    monkeypatch.setattr(type(checkpoint.family), "latent_shape", lambda *_: (shape[0] + 1, *shape[1:]))
    message = refusal(case, damaged, text=False)
    assert_matches(
        message, rf"expected a VAE with {shape[0] + 1} latent channels, .*, got {shape[0]}: the folder"
    )


def test_a_prompt_that_is_too_long_says_whose_it_is(case: FamilyCase, checkpoint: Path) -> None:
    """And names the build that takes it, if the model can have one."""
    opened = Checkpoint.open(checkpoint)
    components = Components(opened, dtype=None, offload=False)

    def takes(text_length: int) -> bool:
        try:
            opened.family.check(replace(case.workload, text_length=text_length))
        except InvalidRequest:
            return False
        return True

    longest = max(filter(takes, range(1, opened.family.defaults.text_length + 1)))
    for length, prefix in product({TEXT_LENGTH, longest}, ("", "negative_")):
        workload = replace(case.workload, text_length=length)
        with pytest.raises(InvalidRequest) as refused:
            components.encode([*PROMPTS, "red " * (length + 1)], workload, CPU, prefix)
        message = str(refused.value)
        got = re.fullmatch(
            rf"{prefix}prompt: expected at most {length} tokens, got (\d+): shorten it(.*)", message
        )
        assert got
        possible = takes(int(got[1]))
        ending = f" or rebuild with --text-length {got[1]}" if possible else f", the model reads {length}"
        assert got[2] == ending


def _names(part: Path) -> list[str]:
    (path,) = part.glob("*.safetensors")
    return [*load_file(path)]


def assert_matches(message: str, pattern: str) -> None:
    assert re.search(pattern, message), message
