"""A checkpoint in diffusers' layout, or the name of a published configuration with random weights."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stg_trt.errors import InvalidRequest
from stg_trt.models import quantization
from stg_trt.models.config_file import read_config, read_optional_config
from stg_trt.models.families import family_for, stand_in_for
from stg_trt.models.lora import AppliedLora, Lora, LoraWeights, parse_loras
from stg_trt.models.published import published, published_data
from stg_trt.models.random_weights import random_weights as draw_weights
from stg_trt.models.single_file import ConvertedWeights
from stg_trt.models.source import Source
from stg_trt.models.weights import StoredWeights, check_weights
from stg_trt.system.kept_hashes import kept_sha256

if TYPE_CHECKING:
    from torch import Tensor

    from stg_trt.models.families.base import ModelFamily
    from stg_trt.models.segment import Segment

_NOTES = ("_diffusers_version", "_name_or_path")
# Settings of model_index.json that make other graphs of the same weights.
_SETTINGS = ("expand_timesteps",)


@dataclass(frozen=True)
class Checkpoint:
    """Where the configuration and the weights come from; `source` is None for random weights."""

    name: str
    source: Source | None
    transformer_config: dict[str, Any]
    vae_config: dict[str, Any] | None
    scheduler_config: dict[str, Any]
    model_index: dict[str, Any] | None = None
    lora: tuple[Lora, ...] = ()
    image_encoder_config: dict[str, Any] | None = None
    connectors_config: dict[str, Any] | None = None

    @classmethod
    def open(
        cls,
        checkpoint: str | Path,
        *,
        random_weights: bool = False,
        variant: str | None = None,
        revision: str | None = None,
        lora: Sequence[str | Path] = (),
    ) -> Checkpoint:
        """Reads the configurations; raises InvalidRequest for anything that is not such a checkpoint.

        Weight files must be there and whole, so that a bad one is refused before anything is imported.
        `checkpoint` is a folder, an id of the hub such as owner/name, or a published name;
        `revision` is a branch, tag or commit on the hub. `variant` is the word in the names of weight files,
        such as fp16; parts without it have plain ones. `lora` are FILE or FILE:SCALE, merged into the
        weights; transformer_2=FILE into those of the second expert.
        """
        if not Path(checkpoint).is_dir() and str(checkpoint) in published() and revision is None:
            _check_no_lora(lora)
            return _open_published(str(checkpoint), random_weights)
        source = Source.open(checkpoint, variant, revision, published())
        transformer = read_config(source.folder / source.denoiser / "config.json")
        others = _stand_in(transformer)
        scheduler = _config_or(source.folder / "scheduler" / "scheduler_config.json", others)
        vae = read_optional_config(source.folder / "vae" / "config.json")
        index = read_optional_config(source.folder / "model_index.json") or others.get("model_index")
        opened = cls(
            source.name,
            None if random_weights else source,
            transformer,
            vae,
            scheduler,
            index,
            image_encoder_config=read_optional_config(source.folder / "image_encoder" / "config.json"),
            connectors_config=read_optional_config(source.folder / "connectors" / "config.json"),
        )
        if random_weights:
            _check_no_lora(lora)
            return opened
        quantization.check_config(transformer, source.folder / source.denoiser / "config.json")
        source.check_transformer(source.denoiser)
        if lora and not opened.family.takes_lora:
            raise InvalidRequest(
                f"lora: expected none for {opened.family.name}, of whose layers diffusers merges none, got "
                f"{lora[0]}: leave it out"
            )
        opened = replace(opened, lora=parse_loras(lora))
        opened._check_experts(source)
        return opened

    def shortened(self, counts: Sequence[int] | None) -> Checkpoint:
        """The same with fewer blocks: one number per entry of the family's `block_counts`; None keeps all.

        Raises InvalidRequest if the weights are not random, and for numbers that the model does not have.
        """
        if counts is None:
            return self
        names = self.family.block_counts
        most = [self.family.integer(name) for name in names]
        if self.source is not None:
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
        return family_for(
            self.transformer_config,
            self.vae_config,
            self.model_index,
            self.origin,
            self.image_encoder_config,
            self.connectors_config,
        )

    @property
    def origin(self) -> str:
        """The name of folder, file or repository, and those that diffusers noted on saving."""
        configs = (self.transformer_config, self.model_index or {})
        noted = (Path(str(config.get("_name_or_path") or "")).name for config in configs)
        return " ".join((self.name, *noted))

    def _check_experts(self, source: Source) -> None:
        """Raises InvalidRequest unless all transformers are there, whole, and of one configuration."""
        experts = (self.model_index or {}).get("boundary_ratio") is not None
        others = [name for name in self._parts if experts and name.startswith("transformer_")]
        if others and source.file is not None:
            raise InvalidRequest(
                f"checkpoint: expected a folder with transformer/ and {others[0]}/, which take turns, got "
                f"the single file {source.file.path}: give the folder"
            )
        for part in others:
            path = source.folder / part / "config.json"
            config = read_config(path)
            quantization.check_config(config, path)
            if _facts(config) != _facts(self.transformer_config):
                raise InvalidRequest(
                    f"checkpoint: expected {path} to be that of transformer/, whose graphs it shares, got "
                    "another one: the folder mixes two models; download it again"
                )
            source.check_transformer(part)
        for lora in self.lora:
            if lora.expert > len(others):
                raise InvalidRequest(
                    f"lora: expected none for transformer_2, which {self.name} has not, got {lora.applied}: "
                    "leave transformer_2= out"
                )

    @property
    def has_text_encoder(self) -> bool:
        """Whether a text encoder and a tokenizer are there, so that a prompt can be embedded."""
        parts = self.text_parts
        return self.source is not None and bool(parts) and all(map(self.source.has, parts))

    @property
    def text_parts(self) -> tuple[str, ...]:
        """The parts that turn a prompt into embeddings, as model_index.json names them."""
        return tuple(name for name in self._parts if name.startswith(("text_encoder", "tokenizer")))

    @property
    def _parts(self) -> tuple[str, ...]:
        """The names in model_index.json with a library and a class; nulls stand for no part."""
        index = self.model_index or {}
        return tuple(
            name for name, part in index.items() if isinstance(part, list) and part[:1] not in ([], [None])
        )

    def check_text(self) -> None:
        """Raises InvalidRequest unless text encoders and tokenizers are there, whole and plain."""
        if self.source is None or not self.text_parts:
            raise InvalidRequest(
                f"checkpoint: expected a text encoder that model_index.json names, got none in {self.name}: "
                "pass prompt_embeds, or give the whole checkpoint"
            )
        for name in self.text_parts:
            self._check_part(name)
        for name in self.family.text_image_parts:
            self.check_image_part(name)

    def check_vae(self) -> None:
        """Raises InvalidRequest unless the VAE is there and its files whole and plain."""
        if self.source is None or self.vae_config is None:
            raise InvalidRequest(
                f"checkpoint: expected a VAE to decode with, got no vae/config.json in {self.name}: "
                "pass output_type='latent', or give the whole checkpoint"
            )
        self._check_part("vae")

    def check_image_part(self, name: str) -> None:
        """Raises InvalidRequest unless a part that sees pictures is there, its files whole and plain."""
        self._check_given(name, name in (self.model_index or {}), "sees the picture")

    def check_connector(self) -> None:
        """Raises InvalidRequest unless the part between text encoder and transformer, if any, is whole."""
        if self.family.connector is not None:
            self._check_given(self.family.connector.part, True, "makes the transformer's of the embeddings")

    def check_sound(self) -> None:
        """Raises InvalidRequest unless the parts that decode the sound, if any, are whole."""
        for name in () if self.family.sound_decoder is None else self.family.sound_decoder.parts:
            self._check_given(name, True, "decodes the sound")

    def _check_given(self, name: str, indexed: bool, work: str) -> None:
        if self.source is None or not indexed or not self.source.has(name):
            raise InvalidRequest(
                f"checkpoint: expected {name}/, which {work}, got none in {self.name}: give the whole "
                "checkpoint"
            )
        self._check_part(name)

    def _check_part(self, name: str) -> None:
        """Reads the headers of a part's files."""
        assert self.source is not None
        folder = self.source.part(name)
        if name.startswith("tokenizer") or name.endswith(("processor", "extractor")):
            return
        quantization.check_config(read_config(folder / "config.json"), folder / "config.json")
        self.source.weights(name).shapes()

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
        if self.source is not None:
            transformer = self._empty_transformer()
            expected = transformer.state_dict()
            for part in self.family.transformers:
                check_weights(self._weights(expected, part).shapes(), expected)
            for lora in self._lora_weights:
                lora.check(transformer)

    def fingerprint(self) -> str:
        """SHA-256 of the configuration and the weight files' hashes, which are kept, of all transformers.

        Leaves out the notes that diffusers adds when it saves a configuration: its release and the source.
        """
        settings = {name: True for name in _SETTINGS if (self.model_index or {}).get(name)}
        facts = _facts(self.transformer_config) | settings
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        parts = self.family.transformers
        if self.source is None:
            return "-".join(["random", digest.hexdigest(), *parts[1:]])
        for path in (path for part in parts for path in self.source.transformer_files(part)):
            digest.update(kept_sha256(path).encode())
        return digest.hexdigest()

    @property
    def applied_lora(self) -> tuple[AppliedLora, ...]:
        """The LoRAs as a build records them."""
        return tuple(lora.applied for lora in self.lora)

    def segment_fingerprint(self, segment: Segment) -> str:
        """Of the weights of a segment: the checkpoint's fingerprint, unless a LoRA changes some of them."""
        ends: tuple[None, ...] = (None,) if segment.has_ends else ()
        loras = self._loras_of(segment.expert)
        own = [lora.of_blocks(self.family, (*ends, *segment.blocks)) for lora in loras]
        merged = [lora.sha256() for lora in own if lora.tensors]
        if not merged:
            return self.fingerprint()
        return hashlib.sha256(json.dumps([self.fingerprint(), merged]).encode()).hexdigest()

    @cached_property
    def _lora_weights(self) -> tuple[LoraWeights, ...]:
        return tuple(lora.read(self.family) for lora in self.lora)

    def _loras_of(self, expert: int) -> list[LoraWeights]:
        return [weights for weights in self._lora_weights if weights.lora.expert == expert]

    def load_transformer(
        self, blocks: Iterable[int] | None = None, expert: int = 0, ends: bool = True
    ) -> Any:
        """A diffusers transformer in float32 on the CPU; other blocks than `blocks` stay without memory.

        So do weights of no block, except those that every block reads, unless `ends`.
        """
        from stg_trt.models.timestep_embedding import fix_frequencies

        family, part = self.family, self.family.transformers[expert]
        wanted = {*(range(family.num_blocks) if blocks is None else blocks), *([None] if ends else [])}
        transformer, shared = self._empty_transformer(), family.shared_weights
        everything = transformer.state_dict()
        expected = {n: w for n, w in everything.items() if n in shared or family.block_of(n) in wanted}
        weights = self._read(expected, everything, part, part if expert else "")
        transformer.load_state_dict(weights, strict=False, assign=True)
        for lora in self._loras_of(expert):
            lora.of_blocks(family, wanted).merge(transformer)
        fix_frequencies(transformer)
        return transformer.eval().requires_grad_(False)

    def weight(self, name: str) -> Tensor:
        """One weight of the transformer, in float32."""
        everything = self._empty_transformer().state_dict()
        return self._read({name: everything[name]}, everything, self.family.transformers[0])[name]

    def _read(
        self, wanted: dict[str, Tensor], everything: dict[str, Tensor], part: str, seed: str = ""
    ) -> dict[str, Tensor]:
        """Weights of a transformer, or random ones that its `seed` tells apart from another's."""
        if self.source is None:
            return draw_weights(wanted, seed)
        stored = self._weights(everything, part)
        check_weights(stored.shapes(), everything)
        return stored.read(wanted)

    def _empty_transformer(self) -> Any:
        """The diffusers transformer without memory for its weights."""
        import torch
        from accelerate import init_empty_weights

        transformer_class = self.family.network_class()
        try:
            with init_empty_weights(include_buffers=False), torch.no_grad():
                return transformer_class.from_config(dict(self.transformer_config))
        except (TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(
                f"checkpoint: expected a config.json that {transformer_class.__name__} takes, got one that "
                f"it refuses ({error}): download the checkpoint again"
            ) from error

    def _weights(self, expected: Iterable[str], part: str) -> StoredWeights | ConvertedWeights:
        """A transformer's weights under diffusers' names, which are `expected`."""
        assert self.source is not None
        file, class_name = self.source.file, self.family.transformer_class
        if file is None:
            return self.source.weights(part)
        return ConvertedWeights(file, class_name, self.transformer_config, frozenset(expected))


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer's configuration without notes."""
    return {name: value for name, value in config.items() if name not in _NOTES}


def _check_no_lora(lora: Sequence[str | Path]) -> None:
    if lora:
        raise InvalidRequest(
            f"lora: expected a checkpoint with weights to merge it into, got random ones and {lora[0]}: "
            "leave it out"
        )


def _open_published(name: str, random_weights: bool) -> Checkpoint:
    """A configuration that ships with the package; raises InvalidRequest if its weights are asked for."""
    if not random_weights:
        raise InvalidRequest(
            f"checkpoint: expected a folder with weights, got the configuration {name}: "
            "give a diffusers folder or add --random-weights"
        )
    data = published_data(name)
    transformer, vae, scheduler = data["transformer"], data["vae"], data["scheduler"]
    return Checkpoint(name, None, transformer, vae, scheduler, data.get("model_index"))


def _stand_in(transformer: Mapping[str, Any]) -> dict[str, Any]:
    """The shipped configuration whose other parts a folder of this transformer may leave out."""
    name = stand_in_for(transformer)
    return published_data(name) if name is not None else {}


def _config_or(path: Path, others: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's configuration in a folder, else the one that stands in for it."""
    return read_config(path) if path.exists() or not others else dict(others["scheduler"])
