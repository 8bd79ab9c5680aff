"""The table of model families: transformer class name in diffusers -> module with its ModelFamily."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from stg_trt.errors import InvalidRequest

if TYPE_CHECKING:
    from stg_trt.models.families.base import ModelFamily

# transformer class in diffusers -> (module here, class in it); imported when first asked for
_FAMILIES = {
    "CogVideoXTransformer3DModel": ("cogvideox", "CogVideoX"),
    "HunyuanVideoTransformer3DModel": ("hunyuan_video", "HunyuanVideo"),
    "LTXVideoTransformer3DModel": ("ltx_video", "LTXVideo"),
    "MochiTransformer3DModel": ("mochi", "Mochi"),
    "UNetSpatioTemporalConditionModel": ("svd", "SVD"),
    "WanTransformer3DModel": ("wan", "Wan"),
}


def check_class(config: dict[str, Any]) -> None:
    """Raises InvalidRequest unless a transformer's config.json is of a supported class."""
    class_name = str(config.get("_class_name"))
    if class_name not in _FAMILIES:
        raise InvalidRequest(
            f"checkpoint: expected a transformer of class {', '.join(_FAMILIES)}, got {class_name}: "
            "convert it to diffusers format or use a supported model"
        )


def family_for(
    config: dict[str, Any],
    vae_config: dict[str, Any] | None = None,
    model_index: dict[str, Any] | None = None,
    origin: str = "",
    image_encoder_config: dict[str, Any] | None = None,
) -> ModelFamily:
    """The family of a transformer's config.json; raises InvalidRequest for an unknown class.

    `origin` has the names by which the checkpoint is known, since no configuration says what is distilled.
    """
    check_class(config)
    module, name = _FAMILIES[config["_class_name"]]
    family: type[ModelFamily] = getattr(importlib.import_module(f"stg_trt.models.families.{module}"), name)
    return family(config, vae_config, model_index, origin, image_encoder_config)
