"""Whether the attentions of a segment are still fused kernels after TensorRT compiled it."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A plan of TensorRT-RTX names each fused attention once as this whole word; its variants carry suffixes.
_PLAN_WORD = re.compile(rb"(?<![\w.])_gemm_mha_v2(?![\w.])")
# TensorRT's inspector names kernels: _gemm_mha_v2_myl0_172, __mye8037_gemm_mha_v2, _gemm_mha_v2_0x<hash>.
_KERNEL = re.compile(r"(?i)(gemm_)?mha|fmha|sdpa|attention")
# These are named after the tensors that they copy, which may be an attention's.
_COPIES = ("Reformat", "NoOp", "Constant")


def count_in_plan(path: Path) -> int:
    """Fused attentions in a plan of TensorRT-RTX with one profile; without a GPU no inspector can read it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        return len(_PLAN_WORD.findall(plan))


def count_in_layers(information: str, wanted: int, profiles: int) -> int | None:
    """Fused attentions in the engine inspector's JSON; None if its names are not known here.

    It lists the kernels of all profiles, or of one, depending on the version; an attention may take several.
    None also if no name is an attention's. If all were decomposed, the gate on memory tells; and TensorRT
    decomposes an Attention node only when it is told to.
    """
    kernels = sum(bool(_KERNEL.search(name)) for name in _kernel_names(information))
    if kernels == 0 and wanted:
        return None
    return wanted if kernels == wanted or kernels >= wanted * profiles else kernels


def _kernel_names(information: str) -> Iterator[str]:
    """The kernel of every layer; a layer is its name alone if the engine has no details."""
    try:
        found = json.loads(information)
    except json.JSONDecodeError:
        return
    layers: Any = found.get("Layers") if isinstance(found, dict) else None
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, str):
            yield layer
        elif isinstance(layer, dict) and layer.get("LayerType") not in _COPIES:
            yield str(layer.get("TacticName") or layer.get("Name") or "")
