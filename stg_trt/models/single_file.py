"""A transformer in one file, in the names of its original code or of GGUF, through diffusers' conversions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stg_trt.errors import InvalidRequest
from stg_trt.models.families import check_weight_names
from stg_trt.models.weights import StoredWeights, check_pointer

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
_GGUF = ".gguf"
SUFFIXES = (".safetensors", _GGUF)
# diffusers' answer for what it does not know.
_UNKNOWN = "v1"


@dataclass(frozen=True)
class SingleFile:
    """The file; its names are the original code's, or diffusers' own."""

    path: Path

    def stored_shapes(self) -> Shapes:
        """Shapes by the names in the file, from its header; raises InvalidRequest if it is not whole."""
        if self.path.suffix != _GGUF:
            return StoredWeights((self.path,)).shapes()
        return {tensor.name: _logical_shape(tensor) for tensor in _gguf_tensors(self.path)}

    def configuration(self) -> str:
        """The repository on the hub whose configurations diffusers uses for such a file."""
        from diffusers.loaders import single_file_utils

        shapes = self.stored_shapes()
        check_weight_names(shapes)
        like = _on_meta(shapes)
        try:
            kind = single_file_utils.infer_diffusers_model_type(like)
        # It asks for other tensors of the models that it takes the file for.
        except (LookupError, AttributeError, NameError):
            kind = _UNKNOWN
        if kind == _UNKNOWN:
            raise InvalidRequest(
                f"checkpoint: expected a file of a model that diffusers knows, got {self.path}: put it into "
                "the diffusers folder of its model, beside transformer/ and scheduler/"
            )
        return str(single_file_utils.fetch_diffusers_config(like)["pretrained_model_name_or_path"])


@dataclass(frozen=True)
class ConvertedWeights:
    """The weights of a single file under diffusers' names; `expected` are those of an empty transformer."""

    file: SingleFile
    class_name: str
    config: Mapping[str, Any]
    expected: frozenset[str]

    @property
    def files(self) -> tuple[Path, ...]:
        """The file."""
        return (self.file.path,)

    def shapes(self) -> Shapes:
        """Shapes by diffusers' names; raises InvalidRequest for a file that cannot be converted."""
        converted = self._converted(_on_meta(self.file.stored_shapes()))
        return {name: tuple(tensor.shape) for name, tensor in converted.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names in float32; of the others, only what the conversion computes is read."""
        gguf = self.file.path.suffix == _GGUF
        stored = _gguf_parameters(self.file.path) if gguf else _mapped(self.file.path)
        converted = self._converted(stored)
        return {name: _as_float32(converted[name]) for name in set(names) & converted.keys()}

    def _converted(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """diffusers' mapping of names, unless the file has these already."""
        from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

        if self.expected <= stored.keys():
            return stored
        mapping = SINGLE_FILE_LOADABLE_CLASSES.get(self.class_name, {}).get("checkpoint_mapping_fn")
        try:
            if mapping is None:
                raise KeyError(f"no conversion of {self.class_name}")
            converted: dict[str, Tensor] = mapping(checkpoint=stored, config=dict(self.config))
        except (KeyError, RuntimeError, ValueError, IndexError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise InvalidRequest(
                f"checkpoint: expected a file that diffusers converts for {self.class_name}, got "
                f"{self.file.path} ({reason}): use the model's diffusers folder"
            ) from error
        return converted


def _on_meta(shapes: Shapes) -> dict[str, Tensor]:
    """Tensors without memory."""
    import torch

    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _mapped(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file as views of it, of which only what is used is read."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _gguf_tensors(path: Path) -> list[Any]:
    """What a GGUF file lists, its data mapped; raises InvalidRequest if it is not whole or cannot be read."""
    check_pointer(path)
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InvalidRequest(
            f"checkpoint: expected the Python module gguf to read {path}, got none: pip install "
            "'stg-trt[gguf]'"
        ) from error
    try:
        # Copied when written to, which torch wants of memory and nothing does.
        return list(GGUFReader(path, mode="c").tensors)
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise InvalidRequest(
            f"checkpoint: expected a whole GGUF file, got {path} ({error}): download it again"
        ) from error


def _logical_shape(tensor: Any) -> tuple[int, ...]:
    """GGUF lists the fastest axis first."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _gguf_parameters(path: Path) -> dict[str, Tensor]:
    """Quantised blocks as diffusers' parameters, which know their kind; plain numbers as they are."""
    import torch
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter
    from gguf import GGMLQuantizationType

    plain = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
    parameters: dict[str, Tensor] = {}
    for tensor in _gguf_tensors(path):
        kind = tensor.tensor_type
        if kind not in (*plain, *SUPPORTED_GGUF_QUANT_TYPES):
            raise InvalidRequest(
                f"checkpoint: expected one of {', '.join(one.name for one in SUPPORTED_GGUF_QUANT_TYPES)} in "
                f"{path}, got {kind.name}: use another file of the model, such as Q8_0"
            )
        data = torch.from_numpy(tensor.data)
        parameters[tensor.name] = data if kind in plain else GGUFParameter(data, quant_type=kind)
    return parameters


def _as_float32(tensor: Tensor) -> Tensor:
    import torch

    if not hasattr(tensor, "quant_type"):
        return tensor.to(torch.float32)
    from gguf.quants import dequantize

    # diffusers multiplies by the scales in half precision.
    return torch.from_numpy(dequantize(tensor.as_subclass(torch.Tensor).numpy(), tensor.quant_type))
