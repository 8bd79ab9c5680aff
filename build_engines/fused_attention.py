"""Whether the attentions of a segment are still fused kernels after TensorRT compiled it."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A plan of TensorRT-RTX names each fused attention once as this whole word; its variants carry suffixes.
_PLAN_WORD = b"_gemm_mha_v2"
_IN_WORD = re.compile(rb"[\w.]")
# TensorRT's inspector names kernels: _gemm_mha_v2_myl0_172, __mye8037_gemm_mha_v2, _gemm_mha_v2_0x<hash>.
_KERNEL = re.compile(r"(?i)(gemm_)?mha|fmha|sdpa|attention")
# These are named after the tensors that they copy, which may be an attention's.
_COPIES = ("Reformat", "NoOp", "Constant")


def count_in_plan(path: Path) -> int:
    """Fused attentions in a plan of TensorRT-RTX with one profile; without a GPU no inspector can read it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        return sum(_is_whole_word(plan, place) for place in _places(plan))


def _places(plan: mmap.mmap) -> Iterator[int]:
    """Where the word begins: a search of bytes; a regular expression takes longer than the whole build."""
    place = plan.find(_PLAN_WORD)
    while place >= 0:
        yield place
        place = plan.find(_PLAN_WORD, place + len(_PLAN_WORD))


def _is_whole_word(plan: mmap.mmap, place: int) -> bool:
    end = place + len(_PLAN_WORD)
    around = plan[max(0, place - 1) : place], plan[end : end + 1]
    return not any(_IN_WORD.match(byte) for byte in around)


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
