"""Published guidance tables, shipped as JSON, with the steps they belong to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

from stg_trt.errors import InvalidRequest
from stg_trt.guidance.bins import TimestepBins
from stg_trt.guidance.resolved import ResolvedGuidance
from stg_trt.models.custom_steps import CustomSteps

_FOLDER = resources.files("stg_trt") / "presets"


@dataclass(frozen=True)
class Preset:
    """Published tables and their steps; see `load_preset`. `custom` lists the steps of a distilled model."""

    num_inference_steps: int
    drop_first: int
    drop_last: int
    guidance: ResolvedGuidance
    custom: CustomSteps | None = None


def check_preset(name: str) -> None:
    """Raises InvalidRequest unless `stg_trt/presets` has a file of that name."""
    files = (entry.name for entry in _FOLDER.iterdir())
    known = sorted(file.removesuffix(".json") for file in files if file.endswith(".json"))
    if name not in known:
        raise InvalidRequest(f"preset: expected one of {', '.join(known)}, got {name!r}: correct the name")


def load_preset(name: str) -> Preset:
    """A preset by its file's name without `.json`."""
    check_preset(name)
    data = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    edges = tuple(data["edges"])

    def bins(key: str) -> TimestepBins[float]:
        return TimestepBins(edges, tuple(float(value) for value in data[key]))

    guidance = ResolvedGuidance(
        guidance_scale=bins("guidance_scale"),
        stg_scale=bins("stg_scale"),
        rescale=bins("rescale"),
        stg_mode=data["stg_mode"],
        stg_blocks=TimestepBins(edges, tuple(tuple(blocks) for blocks in data["stg_blocks"])),
        cfg_zero_star=data["cfg_zero_star"],
    )
    custom = CustomSteps.read(data.get("timesteps"), None)
    return Preset(data["num_inference_steps"], data["drop_first"], data["drop_last"], guidance, custom)
