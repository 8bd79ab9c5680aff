"""LoRAs that a build merges into the weights: read through diffusers, merged through peft."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stg_trt.errors import InvalidRequest
from stg_trt.models.weights import check_pointer
from stg_trt.system.kept_hashes import kept_sha256

if TYPE_CHECKING:
    from torch import Tensor

    from stg_trt.models.families.base import ModelFamily

_PREFIX = "transformer."
# Before the file of a LoRA that diffusers loads with load_into_transformer_2.
_SECOND = "transformer_2="
_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias")


@dataclass(frozen=True, order=True)
class AppliedLora:
    """A LoRA that engines were built with: the hash of its file, its scale and the transformer's number.

    The name is for messages.
    """

    sha256: str
    scale: float
    name: str = field(compare=False)
    expert: int = 0

    def __str__(self) -> str:
        return f"{_SECOND if self.expert else ''}{self.name}:{self.scale:g}"


@dataclass(frozen=True)
class Lora:
    """A safetensors file of low-rank matrices, and how much of it is added to which transformer's weights."""

    path: Path
    scale: float = 1.0
    expert: int = 0

    @classmethod
    def parse(cls, text: str | Path) -> Lora:
        """FILE or FILE:SCALE, after transformer_2= if it belongs there.

        Raises InvalidRequest without such a file or with a scale that is no number.
        """
        given = str(text).removeprefix(_SECOND)
        name, scale = given, 1.0
        if not Path(given).is_file():
            name, _, number = given.rpartition(":")
            try:
                scale = float(number)
            except ValueError:
                name = given
        # diffusers would unpickle a file with another ending.
        if not Path(name).is_file() or Path(name).suffix != ".safetensors" or not math.isfinite(scale):
            raise InvalidRequest(
                f"lora: expected FILE.safetensors or FILE.safetensors:SCALE, got {text}: check the path"
            )
        return cls(Path(name), scale, int(given != str(text)))

    @property
    def text(self) -> str:
        """What `parse` reads as this LoRA in any working directory."""
        return f"{_SECOND if self.expert else ''}{self.path.absolute()}:{self.scale!r}"

    @property
    def applied(self) -> AppliedLora:
        """What a build records of it."""
        return AppliedLora(kept_sha256(self.path), self.scale, self.path.name, self.expert)

    def read(self, family: ModelFamily) -> LoraWeights:
        """Its matrices under diffusers' names; raises InvalidRequest if they cannot all be merged."""
        _check_stored(self.path)
        _check_peft()
        from stg_trt.models.families.base import load_class

        try:
            tensors, metadata = load_class(family.pipeline_class).lora_state_dict(
                str(self.path.parent),
                weight_name=self.path.name,
                use_safetensors=True,
                local_files_only=True,
                return_lora_metadata=True,
            )
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            raise _foreign(
                self.path, f"one that diffusers cannot read ({str(error).splitlines()[0]})"
            ) from error
        other = next((name for name in sorted(tensors) if not _is_of_transformer(name)), None)
        if other is not None or not tensors:
            raise _foreign(self.path, other or "no matrices")
        plain = {name.removeprefix(_PREFIX): tensor.float() for name, tensor in tensors.items()}
        return LoraWeights(self, plain, metadata or {})


@dataclass(frozen=True)
class LoraWeights:
    """Matrices by name, as blocks.0.to_q.lora_A.weight, and the file's notes on ranks and alphas."""

    lora: Lora
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]

    def check(self, model: Any) -> None:
        """Raises InvalidRequest unless every matrix belongs to a weight of the model and fits it."""
        modules = dict(model.named_modules())
        for name, tensor in self.tensors.items():
            module = modules.get(_module(name))
            weight = getattr(module, "weight", None)
            if weight is None:
                raise _foreign(self.lora.path, f"{name}, which the transformer has not")
            axis = 1 if ".lora_A." in name else 0
            got = tensor.shape[axis if tensor.ndim > 1 else 0]
            if got != weight.shape[axis]:
                raise _foreign(self.lora.path, f"{name} of size {got} instead of {weight.shape[axis]}")

    def of_blocks(self, family: ModelFamily, blocks: Iterable[int | None]) -> LoraWeights:
        """Those of some blocks alone; None stands for what is in no block."""
        wanted = set(blocks)
        kept = {
            name: tensor
            for name, tensor in self.tensors.items()
            if family.block_of(f"{_module(name)}.weight") in wanted
        }
        return LoraWeights(self.lora, kept, self.metadata)

    def merge(self, model: Any) -> None:
        """Adds scale * alpha / rank * B A to each weight of a diffusers model, in place."""
        if not self.tensors:
            return
        prefixed = {f"{_PREFIX}{name}": tensor for name, tensor in self.tensors.items()}
        notes = {"metadata": dict(self.metadata)} if self.metadata else {}
        model.load_lora_adapter(prefixed, prefix="transformer", adapter_name="merged", **notes)
        model.set_adapters(["merged"], [self.lora.scale])
        model.fuse_lora()
        model.unload_lora()

    def sha256(self) -> str:
        """Of all that decides what is added to the weights."""
        hashed = hashlib.sha256(json.dumps([self.lora.scale, self.metadata], sort_keys=True).encode())
        for name, tensor in sorted(self.tensors.items()):
            hashed.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        return hashed.hexdigest()


def parse_loras(texts: Sequence[str | Path]) -> tuple[Lora, ...]:
    """In an order that does not depend on the user's, without those of scale 0, which change nothing."""
    loras = (Lora.parse(text) for text in texts)
    return tuple(sorted((lora for lora in loras if lora.scale), key=lambda lora: lora.applied))


def describe(loras: Sequence[AppliedLora]) -> str:
    """For messages."""
    return ", ".join(map(str, loras)) or "none"


def _module(name: str) -> str:
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    return name


def _is_of_transformer(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith(_ENDINGS)


def _check_stored(path: Path) -> None:
    """Raises InvalidRequest for a file that is not whole, and for DoRA, whose magnitudes diffusers drops."""
    from safetensors import SafetensorError, safe_open

    check_pointer(path)
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise _foreign(path, f"no whole safetensors file ({error})") from error
    magnitude = next((name for name in names if "dora_scale" in name or "lora_magnitude" in name), None)
    if magnitude is not None:
        raise _foreign(path, f"a DoRA ({magnitude})")


def _check_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise InvalidRequest(
            "lora: expected the Python module peft, got none: pip install 'stg-trt[lora]'"
        ) from error


def _foreign(path: Path, got: str) -> InvalidRequest:
    return InvalidRequest(
        f"lora: expected {path} with low-rank matrices of this transformer alone, got {got}: use a LoRA of "
        "this model, or merge it yourself"
    )
