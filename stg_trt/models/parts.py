"""Text encoders, tokenizers and VAE of a checkpoint: whole, or refused before any sampling."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.config_file import read_config
from stg_trt.models.families.base import POOLED
from stg_trt.models.workload import Workload

# The border tensor that each text encoder makes.
_EMBEDDINGS = {"text_encoder": "prompt_embeds", "text_encoder_2": POOLED}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def load_text_parts(checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype], workload: Workload) -> Any:
    """The checkpoint's diffusers pipeline with text encoders and tokenizers alone; `dtypes` has a default.

    Raises InvalidRequest for a part that is missing or not whole, and for parts that do not fit each other.
    """
    checkpoint.check_text()
    specs = checkpoint.family.tensors(workload)
    parts = {}
    for name in checkpoint.text_parts:
        if name.startswith("tokenizer"):
            parts[name] = _load_tokenizer(checkpoint, name)
            continue
        parts[name] = _load_model(checkpoint, name, _indexed_class(checkpoint, name), dtypes)
        width = specs[_EMBEDDINGS[name]].shape[-1]
        assert isinstance(width, int)
        _check_width(name, _text_width(checkpoint, parts[name].config), width)
    parts |= {name: _load_processor(checkpoint, name) for name in checkpoint.family.text_image_parts}
    for name in (name for name in parts if name.startswith("tokenizer")):
        encoder = parts.get(name.replace("tokenizer", "text_encoder"))
        if encoder is not None:
            _check_vocabulary(name, parts[name], encoder)
    return _pipeline(checkpoint, parts)


def load_vae_part(checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype], workload: Workload) -> Any:
    """The checkpoint's diffusers pipeline with the VAE alone; raises InvalidRequest as `load_text_parts`."""
    checkpoint.check_vae()
    vae = _load_model(checkpoint, "vae", _vae_class(checkpoint), dtypes)
    channels = getattr(vae.config, "latent_channels", None) or getattr(vae.config, "z_dim", None)
    wanted = checkpoint.family.latent_shape(workload)[0]
    if channels != wanted:
        raise InvalidRequest(
            f"checkpoint: expected a VAE with {wanted} latent channels, as the transformer has, got "
            f"{channels}: the folder mixes two models; download it again"
        )
    return _pipeline(checkpoint, {"vae": vae})


def load_connector_part(checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype]) -> Any:
    """The part between text encoder and transformer; raises InvalidRequest as `load_text_parts`."""
    connector = checkpoint.family.connector
    assert connector is not None
    checkpoint.check_connector()
    return _load_model(checkpoint, connector.part, _class_beside_pipeline(checkpoint, connector.part), dtypes)


def add_sound_parts(pipeline: Any, checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype]) -> None:
    """Adds the parts that decode the sound; raises InvalidRequest as `load_text_parts`."""
    decoder = checkpoint.family.sound_decoder
    assert decoder is not None
    checkpoint.check_sound()
    pipeline.register_modules(**{
        name: _load_model(checkpoint, name, _class_beside_pipeline(checkpoint, name), dtypes)
        for name in decoder.parts
    })  # fmt: skip
    decoder.check(pipeline, checkpoint.transformer_config)


def add_image_parts(pipeline: Any, checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype]) -> None:
    """Adds the parts that see a call's pictures; raises InvalidRequest as `load_text_parts`."""
    parts = {}
    for name in checkpoint.family.image_parts:
        checkpoint.check_image_part(name)
        if name.endswith("encoder"):
            parts[name] = _load_model(checkpoint, name, _indexed_class(checkpoint, name), dtypes)
        else:
            parts[name] = _load_processor(checkpoint, name)
    pipeline.register_modules(**parts)


def _load_processor(checkpoint: Checkpoint, name: str) -> Any:
    assert checkpoint.source is not None
    try:
        return _indexed_class(checkpoint, name).from_pretrained(
            checkpoint.source.part(name), local_files_only=True
        )
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(name, error) from error


def _pipeline(checkpoint: Checkpoint, parts: Mapping[str, Any]) -> Any:
    """The family's pipeline of `parts` and the settings of model_index.json, with None for the rest."""
    pipeline_class = checkpoint.family.pipeline_type()
    given = {**(checkpoint.model_index or {}), **parts}
    arguments = {}
    for name, parameter in inspect.signature(pipeline_class.__init__).parameters.items():
        if name in given and not isinstance(given[name], list):
            arguments[name] = given[name]
        elif name != "self" and parameter.default is parameter.empty:
            arguments[name] = None
    return pipeline_class(**arguments)


def _indexed_class(checkpoint: Checkpoint, name: str) -> Any:
    """The class of a part, as model_index.json names it."""
    assert checkpoint.model_index is not None
    entry = checkpoint.model_index[name]
    library, class_name = (str(word) for word in (*entry, "", "")[:2])
    return _class_of(library, class_name, name, "model_index.json")


def _class_beside_pipeline(checkpoint: Checkpoint, name: str) -> Any:
    """The class that a part's configuration names, which diffusers keeps in the module of its pipeline."""
    assert checkpoint.source is not None
    config = read_config(checkpoint.source.part(name) / "config.json")
    module = checkpoint.family.pipeline_type().__module__
    return _class_of(module, str(config["_class_name"]), name, f"{name}/config.json")


def _vae_class(checkpoint: Checkpoint) -> Any:
    own = checkpoint.family.own_vae_class()
    if own is not None:
        return own
    assert checkpoint.vae_config is not None
    return _class_of("diffusers", str(checkpoint.vae_config["_class_name"]), "vae", "vae/config.json")


def _class_of(library: str, class_name: str, part: str, file: str) -> Any:
    """A class that `file` names; raises InvalidRequest if the library has no such model."""
    found = None
    if library.split(".")[0] in ("transformers", "diffusers"):
        found = getattr(importlib.import_module(library), class_name, None)
    if not hasattr(found, "from_pretrained"):
        raise InvalidRequest(
            f"checkpoint: expected a class of transformers or diffusers for {part}/, got {library} "
            f"{class_name}: correct {file}, or install the version of the library that has it"
        )
    return found


def _load_model(
    checkpoint: Checkpoint, name: str, model_class: Any, dtypes: Mapping[str, torch.dtype]
) -> Any:
    assert checkpoint.source is not None
    folder, stored = checkpoint.source.part(name), checkpoint.source.weights(name)
    try:
        model, loaded = model_class.from_pretrained(
            folder,
            dtype=dtypes.get(name, dtypes["default"]),
            variant=stored.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise _unreadable(name, error) from error
    _check_loaded(name, model, loaded)
    return model


def _check_loaded(part: str, model: Any, loaded: Mapping[str, Any]) -> None:
    """Raises InvalidRequest if the files lack a tensor, or have blocks that the configuration leaves out."""
    expected = model.state_dict().keys()
    missing = sorted(loaded["missing_keys"])
    foreign = sorted(key for key in loaded["unexpected_keys"] if _NUMBER.sub("0", key) in expected)
    if missing or foreign:
        got = f"none of the name {missing[0]}" if missing else f"also {foreign[0]}"
        raise InvalidRequest(
            f"checkpoint: expected the weights of {part}/config.json, got {got}: the folder is not whole or "
            "holds another model; download it again"
        )


def _load_tokenizer(checkpoint: Checkpoint, name: str) -> Any:
    """Raises InvalidRequest without the files of its words, of which the library makes an empty tokenizer."""
    assert checkpoint.source is not None
    folder, tokenizer_class = checkpoint.source.part(name), _indexed_class(checkpoint, name)
    names = dict(getattr(tokenizer_class, "vocab_files_names", {}))
    whole = names.pop("tokenizer_file", "tokenizer.json")
    if not (folder / whole).is_file():
        _check_files(folder, whole, tuple(names.values()))
    try:
        tokenizer = tokenizer_class.from_pretrained(folder, local_files_only=True)
    # Its parser raises exceptions of no other class than this.
    except Exception as error:
        raise _unreadable(name, error) from error
    if not any(any(map(str.isalnum, word)) for word in _words(tokenizer)):
        raise InvalidRequest(
            f"checkpoint: expected a tokenizer with words in {name}/, got one that knows none, so that every "
            "prompt would be the same: download it again"
        )
    return tokenizer


def _words(tokenizer: Any) -> dict[str, int]:
    """The vocabulary without what was added to it, such as markers of beginning and end."""
    added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return {word: number for word, number in tokenizer.get_vocab().items() if word not in added}


def _check_files(folder: Path, whole: str, parts: Sequence[str]) -> None:
    missing = [name for name in parts if not (folder / name).is_file()]
    if missing or not parts:
        raise InvalidRequest(
            f"checkpoint: expected {' or '.join([whole, ' with '.join(parts)])} in {folder.name}/, the "
            f"tokenizer's words, got no {missing[0] if missing else whole}: download it again"
        )


def _check_vocabulary(part: str, tokenizer: Any, encoder: Any) -> None:
    """Raises InvalidRequest for a tokenizer whose words the text encoder has no embeddings of."""
    highest = max(_words(tokenizer).values())
    known = encoder.get_input_embeddings().num_embeddings
    if highest >= known:
        raise InvalidRequest(
            f"checkpoint: expected words of {part}/ below {known}, which its text encoder knows, got word "
            f"{highest}: the folder mixes two models; download it again"
        )


def _text_width(checkpoint: Checkpoint, config: Any) -> int:
    """Of what a text encoder makes."""
    connector = checkpoint.family.connector
    return int(config.get_text_config().hidden_size if connector is None else connector.width(config))


def _check_width(part: str, width: int, expected: int) -> None:
    if width != expected:
        raise InvalidRequest(
            f"checkpoint: expected {part}/ with embeddings of width {expected}, as the transformer takes, "
            f"got {width}: the folder mixes two models; download it again"
        )


def _unreadable(part: str, error: Exception) -> InvalidRequest:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InvalidRequest(f"checkpoint: expected a whole {part}/, got {reason}: download it again")
