"""The weight files of one part of a checkpoint: found, checked by their headers, and read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stg_trt.errors import InvalidRequest
from stg_trt.models import quantization
from stg_trt.models.config_file import read_config

if TYPE_CHECKING:
    from torch import Tensor

# Of diffusers' models, and of transformers'.
STEMS = ("diffusion_pytorch_model", "model")
_PICKLES = ("*.bin", "*.pt", "*.ckpt")
# Shards are diffusion_pytorch_model.fp16-00001-of-00002.safetensors, or have the word before the ending.
_VARIANT = re.compile(
    rf"^(?:{'|'.join(STEMS)})(?:-\d+-of-\d+)?\.(\w+)(?:-\d+-of-\d+)?\.safetensors$"
    rf"|^(?:{'|'.join(STEMS)})\.safetensors\.index\.(\w+)\.json$"
)
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredWeights:
    """Safetensors files that together hold a model; `variant` is the word in their names, such as fp16."""

    files: tuple[Path, ...]
    variant: str | None = None

    @classmethod
    def of_variant(cls, folder: Path, variant: str | None) -> StoredWeights | None:
        """Those in a part's folder with the word, None for those without one; None if there are none.

        Raises InvalidRequest if one that the index names is missing.
        """
        for stem in STEMS:
            files = _files(folder, stem, variant)
            if files:
                return cls(tuple(files), variant)
        return None

    @staticmethod
    def missing(folder: Path) -> InvalidRequest:
        """Why a part's folder has no weights that can be read."""
        return _missing(folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, from the headers.

        Raises InvalidRequest for a file that is cut short or a Git LFS pointer, and for quantised weights.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self.files:
            shapes |= _shapes(path)
        return shapes

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names that the files hold, in float32."""
        import torch
        from safetensors import safe_open

        wanted = set(names)
        weights: dict[str, Tensor] = {}
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                for name in wanted & set(file.keys()):
                    weights[name] = file.get_tensor(name).to(torch.float32)
        return weights


def check_weights(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, Any]) -> None:
    """Raises InvalidRequest unless shapes by name are those of the tensors of `expected`, and no others."""
    unknown, missing = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
    if unknown or missing:
        got = f"{len(found)}; the first missing is {missing[0]}" if missing else f"{unknown[0]} beside them"
        raise InvalidRequest(
            f"checkpoint: expected the {len(expected)} weights of config.json, got {got}: "
            "the folder holds another model than its config.json says; download it again"
        )
    for name, tensor in expected.items():
        if found[name] != tuple(tensor.shape):
            raise InvalidRequest(
                f"checkpoint: expected {name} of shape {tuple(tensor.shape)} from config.json, got "
                f"{found[name]}: the folder mixes two models; download it again"
            )


def variants(names: Iterable[str]) -> list[str]:
    """The words in names of weight files, such as fp16 in diffusion_pytorch_model.fp16.safetensors."""
    return sorted({word for name in names for found in _VARIANT.findall(name) for word in found if word})


def _files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    word = "" if variant is None else f".{variant}"
    single = folder / f"{stem}{word}.safetensors"
    for index in (f"{stem}.safetensors.index{word}.json", f"{stem}{word}.safetensors.index.json"):
        if (folder / index).exists():
            return _shards(folder / index)
    return [single] if single.is_file() else []


def _shards(index: Path) -> list[Path]:
    """The weight files that an index names; raises InvalidRequest if one is not there."""
    names = read_config(index)["weight_map"]
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in names.values()
    ):
        raise InvalidRequest(
            f"checkpoint: expected weight_map in {index} to name files beside it, got something else: "
            "download the checkpoint again"
        )
    files = [index.parent / name for name in sorted(set(names.values()))]
    for path in files:
        if not path.is_file():
            raise InvalidRequest(
                f"checkpoint: expected the weights {path.parent.name}/{path.name}, got no such file: "
                "download the checkpoint again (safetensors format)"
            )
    return files


def _missing(folder: Path) -> InvalidRequest:
    """Why a part's folder has no weights that can be read."""
    others = variants(path.name for path in folder.iterdir())
    if others:
        return InvalidRequest(
            f"checkpoint: expected plain weights in {folder.name}/, got only the variant "
            f"{', '.join(others)}: add --variant {others[0]} (variant={others[0]!r} in Python)"
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return InvalidRequest(
            f"checkpoint: expected weights in safetensors format in {folder.name}/, got {pickles[0]}: load "
            "the checkpoint with diffusers and save_pretrained() it again"
        )
    stem = STEMS[0] if (folder / "config.json").exists() and not _of_transformers(folder) else STEMS[1]
    return InvalidRequest(
        f"checkpoint: expected the weights {folder.name}/{stem}.safetensors, got no such file: "
        "download the checkpoint again (safetensors format)"
    )


def _of_transformers(folder: Path) -> bool:
    return "architectures" in read_config(folder / "config.json")


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file; reads its header and compares it with the file's size."""
    from safetensors import SafetensorError, safe_open

    check_pointer(path)
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            quantization.check_names(names, file.metadata() or {}, path)
            slices = {name: file.get_slice(name) for name in names}
            for name, one in slices.items():
                quantization.check_type(name, one.get_dtype(), path)
            return {name: tuple(one.get_shape()) for name, one in slices.items()}
    except SafetensorError as error:
        raise InvalidRequest(
            f"checkpoint: expected a whole safetensors file, got {path} ({error}): download it again"
        ) from error


def check_pointer(path: Path) -> None:
    """Raises InvalidRequest for the few lines that git leaves in place of a large file."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise InvalidRequest(
                f"checkpoint: expected the contents of {path}, got a Git LFS pointer to them: run git lfs "
                "pull in the folder, or download it with hf download"
            )
