"""A diffusers checkpoint folder, or the name of a published configuration with random weights."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stg_trt.errors import InvalidRequest
from stg_trt.models.families import check_class, family_for

if TYPE_CHECKING:
    from stg_trt.models.families.base import ModelFamily

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_CHUNK_BYTES = 16 << 20
_NOTES = ("_diffusers_version", "_name_or_path")


def published() -> tuple[str, ...]:
    """Names of the model configurations that ship with the package."""
    entries = (resources.files("stg_trt") / "published").iterdir()
    return tuple(sorted(e.name.removesuffix(".json") for e in entries if e.name.endswith(".json")))


@dataclass(frozen=True)
class Checkpoint:
    """Where the configuration and the weights come from; `folder` is None for random weights."""

    name: str
    folder: Path | None
    transformer_config: dict[str, Any]
    vae_config: dict[str, Any] | None
    scheduler_config: dict[str, Any]
    model_index: dict[str, Any] | None = None

    @classmethod
    def open(cls, checkpoint: str | Path, *, random_weights: bool = False) -> Checkpoint:
        """Reads the configurations; raises InvalidRequest for anything that is not such a checkpoint.

        Weight files must be there and whole, so that a bad one is refused before anything is imported.
        """
        folder = Path(checkpoint)
        if not folder.is_dir() and str(checkpoint) in published():
            if not random_weights:
                raise InvalidRequest(
                    f"checkpoint: expected a folder with weights, got the configuration {checkpoint}: "
                    "give a diffusers folder or add --random-weights"
                )
            text = (resources.files("stg_trt") / "published" / f"{checkpoint}.json").read_text("utf-8")
            data = json.loads(text)
            transformer, vae, scheduler = data["transformer"], data["vae"], data["scheduler"]
            return cls(str(checkpoint), None, transformer, vae, scheduler, data.get("model_index"))
        if not folder.is_dir():
            raise InvalidRequest(
                f"checkpoint: expected a diffusers folder or one of {', '.join(published())}, "
                f"got {checkpoint}, which is neither: check the path"
            )
        transformer = _read_config(folder / "transformer" / "config.json")
        scheduler = _read_config(folder / "scheduler" / "scheduler_config.json")
        vae_file = folder / "vae" / "config.json"
        vae = _read_config(vae_file) if vae_file.exists() else None
        index_file = folder / "model_index.json"
        index = _read_config(index_file) if index_file.exists() else None
        check_class(transformer)
        opened = cls(folder.name, None if random_weights else folder, transformer, vae, scheduler, index)
        if not random_weights:
            for path in opened._weight_files():
                _weight_shapes(path)
        return opened

    def shortened(self, counts: Sequence[int] | None) -> Checkpoint:
        """The same with fewer blocks: one number per entry of the family's `block_counts`; None keeps all.

        Raises InvalidRequest if the weights are not random, and for numbers that the model does not have.
        """
        if counts is None:
            return self
        names = self.family.block_counts
        most = [self.family.integer(name) for name in names]
        if self.folder is not None:
            raise InvalidRequest(
                "blocks: expected random weights, got a checkpoint that needs all of its blocks: add "
                "--random-weights or leave --blocks out"
            )
        counted = len(counts) == len(names)
        if not counted or any(not 1 <= n <= limit for n, limit in zip(counts, most, strict=True)):
            ranges = ", ".join(f"{name} 1 to {limit}" for name, limit in zip(names, most, strict=True))
            raise InvalidRequest(
                f"blocks: expected {ranges}, got {','.join(map(str, counts)) or 'none'}: write --blocks "
                f"{','.join(str(min(2, limit)) for limit in most)}"
            )
        config = copy.copy(self.transformer_config)
        config.update(zip(names, counts, strict=True))
        return replace(self, transformer_config=config)

    @property
    def family(self) -> ModelFamily:
        """The model family of the transformer."""
        return family_for(self.transformer_config, self.vae_config, self.model_index, self.origin)

    @property
    def origin(self) -> str:
        """Its names: the folder's, in a cache the repository's, and those that diffusers noted on saving."""
        folder = (self.folder or Path(self.name)).absolute()
        cached = folder.parents[1].name if folder.parent.name == "snapshots" else ""
        configs = (self.transformer_config, self.model_index or {})
        noted = (Path(str(config.get("_name_or_path") or "")).name for config in configs)
        return " ".join((self.name, cached, *noted))

    @property
    def has_pipeline(self) -> bool:
        """Whether text encoder, tokenizer and VAE are there, so that a prompt can become a video."""
        return self.folder is not None and self.model_index is not None

    def check_pipeline(self) -> None:
        """Raises InvalidRequest unless text encoder, tokenizer and VAE are there."""
        if not self.has_pipeline:
            raise InvalidRequest(
                f"checkpoint: expected a text encoder and a VAE (model_index.json), got only a transformer "
                f"in {self.name}: pass prompt_embeds and output_type='latent'"
            )
        assert self.folder is not None and self.model_index is not None
        for name, part in self.model_index.items():
            # (library, class), or nulls for none. Without a folder transformers makes an empty tokenizer.
            named = isinstance(part, list) and part[:1] not in ([], [None])
            if named and not (self.folder / name).is_dir():
                raise InvalidRequest(
                    f"checkpoint: expected a whole {self.family.pipeline_class} folder, got no {name}/ in "
                    f"{self.folder}: download it again"
                )

    def scheduler(self) -> Any:
        """A new scheduler of the checkpoint's class and configuration."""
        from stg_trt.models.families.base import load_class

        class_name = str(self.scheduler_config.get("_class_name"))
        try:
            scheduler_class = load_class(class_name)
        except AttributeError:
            scheduler_class = None
        if not hasattr(scheduler_class, "set_timesteps"):
            raise InvalidRequest(
                f"checkpoint: expected a diffusers scheduler, got {class_name}: correct scheduler_config.json"
            )
        return scheduler_class.from_config(self.scheduler_config)

    def check(self) -> None:
        """Raises InvalidRequest unless scheduler and weights are usable; reads only the files' headers."""
        self.scheduler()
        self.family.check_pipeline()
        if self.folder is not None:
            self._check_weights(self._empty_transformer().state_dict())

    def fingerprint(self) -> str:
        """SHA-256 of the transformer's configuration and weight files.

        Leaves out the notes that diffusers adds when it saves a configuration: its release and the source.
        """
        facts = {name: value for name, value in self.transformer_config.items() if name not in _NOTES}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        if self.folder is None:
            return f"random-{digest.hexdigest()}"
        for path in self._weight_files():
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()

    def load_transformer(self, blocks: Iterable[int] | None = None) -> Any:
        """The diffusers transformer in float32 on the CPU; other blocks than `blocks` stay without memory."""
        family = self.family
        wanted = set(range(family.num_blocks) if blocks is None else blocks)
        transformer = self._empty_transformer()
        everything = transformer.state_dict()
        expected = {
            name: tensor
            for name, tensor in everything.items()
            if (block := family.block_of(name)) is None or block in wanted
        }
        if self.folder is None:
            weights = _random_weights(expected)
        else:
            self._check_weights(everything)
            weights = self._read_weights(expected)
        transformer.load_state_dict(weights, strict=False, assign=True)
        return transformer.eval().requires_grad_(False)

    def _empty_transformer(self) -> Any:
        """The diffusers transformer without memory for its weights."""
        import torch
        from accelerate import init_empty_weights

        from stg_trt.models.families.base import load_class

        transformer_class = load_class(self.family.transformer_class)
        try:
            with init_empty_weights(include_buffers=False), torch.no_grad():
                return transformer_class.from_config(dict(self.transformer_config))
        except (TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(
                f"checkpoint: expected a config.json that {transformer_class.__name__} takes, got one that "
                f"it refuses ({error}): download the checkpoint again"
            ) from error

    def _weight_files(self) -> list[Path]:
        assert self.folder is not None
        folder = self.folder / "transformer"
        index = folder / f"{_WEIGHTS}.index.json"
        files = _shards(index) if index.exists() else [folder / _WEIGHTS]
        for path in files:
            if not path.is_file():
                raise InvalidRequest(
                    f"checkpoint: expected the weights {path.relative_to(self.folder)}, got no such file: "
                    "download the checkpoint again (safetensors format)"
                )
        return files

    def _check_weights(self, expected: dict[str, Any]) -> None:
        """The files hold the tensors of `expected`, in their shapes, and no others."""
        found: dict[str, tuple[int, ...]] = {}
        for path in self._weight_files():
            found |= _weight_shapes(path)
        unknown, missing = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
        if unknown or missing:
            got = (
                f"{len(found)}; the first missing is {missing[0]}" if missing else f"{unknown[0]} beside them"
            )
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

    def _read_weights(self, names: Iterable[str]) -> dict[str, Any]:
        import torch
        from safetensors import safe_open

        weights: dict[str, Any] = {}
        for path in self._weight_files():
            with safe_open(path, framework="pt") as file:
                for name in set(names) & set(file.keys()):
                    weights[name] = file.get_tensor(name).to(torch.float32)
        return weights


def _random_weights(expected: dict[str, Any]) -> dict[str, Any]:
    """Fan-in scaled normal matrices, ones for norms: timed and compiled like trained weights, never zeros.

    Each tensor has a generator of its own, so that all cores can draw at once and the values stay the same.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        drawn = threads.map(lambda item: _random_weight(*item), expected.items())
        return dict(zip(expected, drawn, strict=True))


def _random_weight(name: str, like: Any) -> Any:
    import torch

    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    scale = like.shape[-1] ** -0.5 if like.ndim > 1 else 0.02
    weight = torch.randn(like.shape, generator=generator).mul_(scale)
    if like.ndim == 1 and "norm" in name and name.endswith("weight"):
        weight += 1
    return weight


class _Config(dict[str, Any]):
    """A configuration file; a missing entry is an error for the user."""

    path = Path()

    def __missing__(self, key: str) -> Any:
        raise InvalidRequest(
            f"checkpoint: expected {key} in {self.path}, got no such entry: download the checkpoint again"
        )


def _shards(index: Path) -> list[Path]:
    """The weight files that an index names."""
    names = _read_config(index)["weight_map"]
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in names.values()
    ):
        raise InvalidRequest(
            f"checkpoint: expected weight_map in {index} to name files beside it, got something else: "
            "download the checkpoint again"
        )
    return [index.parent / name for name in sorted(set(names.values()))]


def _weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file; reads its header and compares it with the file's size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InvalidRequest(
            f"checkpoint: expected a whole safetensors file, got {path} ({error}): download it again"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InvalidRequest(
            f"checkpoint: expected a diffusers folder with {path.parent.name}/{path.name}, got none in "
            f"{path.parent.parent}: give the folder that holds transformer/ and scheduler/"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"checkpoint: expected JSON in {path}, got {error}: download the checkpoint again"
        ) from error
    if not isinstance(data, dict):
        raise InvalidRequest(
            f"checkpoint: expected an object in {path}, got {type(data).__name__}: correct it"
        )
    config = _Config(data)
    config.path = path
    return config
