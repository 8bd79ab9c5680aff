"""Weights that are not plain numbers: what they are, and the way to weights that can be read exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stg_trt.errors import InvalidRequest

# safetensors' names of the types whose values float32 holds exactly, or that are no weights (indices, masks).
_PLAIN = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "BOOL"})
_DEQUANTIZE = (
    "load it with the library that quantised it, call dequantize() and save_pretrained(), or use the "
    "original's weights"
)
_ORIGINAL = "use the original's weights in bf16 or fp16"


@dataclass(frozen=True)
class _Kind:
    """Parts of weights' names that give a kind away, what it is called, and the way out."""

    marks: tuple[str, ...]
    got: str
    fix: str


_KINDS = (
    _Kind((".absmax", ".quant_map", ".quant_state", "bitsandbytes__"),
          "4-bit weights of bitsandbytes (nf4 or fp4)", _DEQUANTIZE),
    _Kind((".SCB", ".weight_format"), "8-bit weights of bitsandbytes (int8)", _DEQUANTIZE),
    _Kind((".qweight", ".qzeros", ".g_idx"), "GPTQ or AWQ weights", _DEQUANTIZE),
    _Kind(("scaled_fp8", ".scale_weight", ".weight_scale", ".scale_input", ".input_scale", ".comfy_quant"),
          "scaled fp8 weights, which are wrong without their scales", _ORIGINAL),
    _Kind(("lora_A.", "lora_B.", "lora_down.", "lora_up.", ".base_layer.", ".lora_magnitude"),
          "a LoRA that is not merged",
          "give the plain checkpoint and the LoRA's own file as --lora FILE, or save it after fuse_lora() "
          "and unload_lora()"),
)  # fmt: skip


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raises InvalidRequest if a part's config.json says that its weights are quantised."""
    entry = config.get("quantization_config")
    if entry:
        method = entry.get("quant_method", "an unnamed method") if isinstance(entry, Mapping) else entry
        _refuse(path, f"a quantization_config ({method})", _DEQUANTIZE)


def check_names(names: Iterable[str], metadata: Mapping[str, str], path: Path) -> None:
    """Raises InvalidRequest if the names in a file of weights are those of a quantised or adapted model."""
    names = list(names)
    if "_quantization_metadata" in metadata:
        _refuse(path, "quantised weights (_quantization_metadata)", _ORIGINAL)
    for kind in _KINDS:
        found = next((name for name in names if any(mark in name for mark in kind.marks)), None)
        if found is not None:
            _refuse(path, f"{kind.got}: {found}", kind.fix)


def check_type(name: str, dtype: str, path: Path) -> None:
    """Raises InvalidRequest for a tensor of integers, where only a scale would say what they mean."""
    if dtype not in _PLAIN:
        _refuse(path, f"quantised weights ({dtype} {name})", _DEQUANTIZE)


def _refuse(path: Path, got: str, fix: str) -> None:
    raise InvalidRequest(f"checkpoint: expected plain weights in {path}, got {got}: {fix}")
