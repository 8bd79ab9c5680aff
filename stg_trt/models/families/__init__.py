"""The table of model families: class name of the network -> module with its ModelFamily."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from stg_trt.errors import InvalidRequest

if TYPE_CHECKING:
    from stg_trt.models.families.base import ModelFamily

# class of the network in diffusers, or upstream -> (module here, class in it); imported when first asked for
_FAMILIES = {
    "CogVideoXTransformer3DModel": ("cogvideox", "CogVideoX"),
    "HunyuanVideoTransformer3DModel": ("hunyuan_video", "HunyuanVideo"),
    "LTX2VideoTransformer3DModel": ("ltx2", "LTX2"),
    "LTXVideoTransformer3DModel": ("ltx_video", "LTXVideo"),
    "MochiTransformer3DModel": ("mochi", "Mochi"),
    "STDiT3": ("open_sora", "OpenSora"),
    "UNetSpatioTemporalConditionModel": ("svd", "SVD"),
    "WanTransformer3DModel": ("wan", "Wan"),
}


# Networks that are not published as pipelines, with scheduler and model_index.json -> the shipped
# configuration that has both.
_STAND_INS = {"STDiT3": "open-sora-1.2"}
# Networks of other versions of a family, by the names that their configurations give.
_OTHER_VERSIONS = {
    "STDiT": "Open-Sora 1.0",
    "STDiT2": "Open-Sora 1.1",
}


def class_name_of(config: Mapping[str, Any]) -> str:
    """What diffusers notes in config.json, or transformers, which lists one."""
    noted = config.get("architectures")
    listed = noted[0] if isinstance(noted, list) and len(noted) == 1 else None
    return str(config.get("_class_name", listed))


def check_class(config: Mapping[str, Any]) -> None:
    """Raises InvalidRequest unless a transformer's config.json is of a supported class."""
    class_name = class_name_of(config)
    if class_name in _OTHER_VERSIONS:
        raise InvalidRequest(
            f"checkpoint: expected STDiT3, the network of Open-Sora 1.2, got {class_name} of "
            f"{_OTHER_VERSIONS[class_name]}: use hpcai-tech/OpenSora-STDiT-v3"
        )
    if class_name not in _FAMILIES:
        raise InvalidRequest(
            f"checkpoint: expected a transformer of class {', '.join(_FAMILIES)}, got {class_name}: "
            "convert it to diffusers format or use a supported model"
        )


def check_weight_names(names: Iterable[str]) -> None:
    """Raises InvalidRequest for weights of a network that comes without a configuration."""
    if "cond_in.weight" in names:
        raise InvalidRequest(
            "checkpoint: expected STDiT3, the network of Open-Sora 1.2, got the weights of Open-Sora 2.0: "
            "use hpcai-tech/OpenSora-STDiT-v3"
        )


def stand_in_for(config: Mapping[str, Any]) -> str | None:
    """The shipped configuration whose other parts a folder of this transformer may leave out, if any.

    Raises InvalidRequest for an unknown class. Imports no family: a bad checkpoint is refused before that.
    """
    check_class(config)
    return _STAND_INS.get(class_name_of(config))


def family_for(
    config: dict[str, Any],
    vae_config: dict[str, Any] | None = None,
    model_index: dict[str, Any] | None = None,
    origin: str = "",
    image_encoder_config: dict[str, Any] | None = None,
    connectors_config: dict[str, Any] | None = None,
) -> ModelFamily:
    """The family of a transformer's config.json; raises InvalidRequest for an unknown class.

    `origin` has the names by which the checkpoint is known, since no configuration says what is distilled.
    """
    check_class(config)
    module, name = _FAMILIES[class_name_of(config)]
    family: type[ModelFamily] = getattr(importlib.import_module(f"stg_trt.models.families.{module}"), name)
    return family(config, vae_config, model_index, origin, image_encoder_config, connectors_config)
