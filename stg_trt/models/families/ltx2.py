"""LTX-2 and LTX-2.3: a DiT that denoises a video and its sound side by side.

Reproduces diffusers' LTX2VideoTransformer3DModel and LTX2Pipeline, but for two things: the configuration's
flag `perturbed_attn`, without which diffusers' skip pass is the cond pass, is ignored; and where only one
stream has an STG scale, only its attention is skipped, as in Lightricks' code. These cross a cut: the hidden
states of both streams, their modulations, and the embedded timesteps that the heads read. Constant over the
steps: both prompts, the RoPE tables, and each video token's place among a row's timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stg_trt.errors import InvalidRequest
from stg_trt.models.families.base import load_class
from stg_trt.models.families.dit import DiT
from stg_trt.models.families.keep_flags import (
    KEEP_ATTENTION,
    KEEP_AUDIO_ATTENTION,
    KEEP_CROSS,
    keep_audio_attention_spec,
    keep_cross_spec,
)
from stg_trt.models.families.ltx2_costs import Costs, StreamCosts, segment_flops
from stg_trt.models.families.ltx2_decoding import SOUND_DECODER, decode_frames, denormalized
from stg_trt.models.families.ltx2_defaults import DEFAULTS, of_blocks, unguided
from stg_trt.models.families.ltx2_pictures import IMAGE_OPTIONS, encode_picture
from stg_trt.models.families.ltx2_prompts import CONNECTORS, count_tokens, encode_prompt
from stg_trt.models.families.ltx2_segment import SOUND, STREAMS, VIDEO, LTX2Segment, TextProjections
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.families.token_shift import TokenShift, set_even_sigmas
from stg_trt.models.families.token_timesteps import (
    TIMESTEP_INDEX,
    TIMESTEP_LIMITS,
    timestep_tables,
    token_timestep_specs,
)
from stg_trt.models.float8 import Float8Rule
from stg_trt.models.image import CleanLatents, ImageCondition, Images, Places
from stg_trt.models.segment import Segment
from stg_trt.models.stream import SOUND as SOUND_STREAM
from stg_trt.models.stream import VIDEO as VIDEO_STREAM
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload

_PIPELINE = "LTX2Pipeline"
_SHIFT = TokenShift(1024, 4096, 0.95, 2.05)
# Gemma 3 12B: the embedding and 48 layers.
_TEXT_LAYERS = 49
# The step's timestep, and that of clean tokens.
_TIMESTEP_PLACES = 2
# The embeddings that the text segment projects.
_PROMPTS = {VIDEO: "prompt_video", SOUND: "prompt_audio"}
_ROPE = tuple(f"{stream}rope_{part}" for stream in STREAMS for part in ("cos", "sin"))
_CROSS_ROPE = tuple(f"{stream}cross_rope_{part}" for stream in STREAMS for part in ("cos", "sin"))


@dataclass(frozen=True)
class _Sizes:
    """One stream: its tokens, channels and heads."""

    tokens: int
    width: int
    heads: int


class LTX2(DiT):
    """LTX-2 and 2.3 as diffusers has them (Lightricks, arXiv 2601.03233)."""

    name = "ltx-2"
    transformer_class = "LTX2VideoTransformer3DModel"
    export_version = 3
    pipeline_class = _PIPELINE
    streams = (VIDEO_STREAM, SOUND_STREAM)
    optional_images = ("image",)
    image_options = IMAGE_OPTIONS
    starts_from_given_latents = True
    isolates = True
    rescale_space = "x0"
    connector = CONNECTORS
    sound_decoder = SOUND_DECODER
    # As Lightricks runs it: its long stack of convolutions adds up what bfloat16 rounds.
    float32_components = frozenset({"vocoder"})
    decode_options = frozenset({"decode_timestep", "decode_noise_scale"})
    blocks_name = "transformer_blocks"
    # Timestep MLPs, modulation tables and norms, which are applied in float32.
    float32_islands = r"_embed\.|scale_shift_table|norm"
    segment_class = LTX2Segment
    float8 = Float8Rule(kept_layers=r"norm|to_gate_logits")
    patch = (1, 1, 1)
    timestep_channels = 256
    defaults = DEFAULTS

    def __init__(self, config: Mapping[str, Any], *others: Any) -> None:
        super().__init__(config, *others)
        # LTX-2.0 projects the prompt here; the connectors of 2.3 do it.
        self.has_text_segment = bool(config.get("use_prompt_embeddings", True))
        self._modulates_text = bool(config.get("cross_attn_mod"))
        if not self._modulates_text:
            self.defaults = of_blocks(self.defaults, (29,))
        if "distilled" in self.origin.lower():
            self.defaults = unguided(self.defaults)

    @property
    def feed_forward_width(self) -> int:
        return 4 * self.width

    @property
    def text_channels(self) -> int:
        """Of the embeddings before the connectors: those of all layers, side by side."""
        connectors = self.connectors_config or {}
        return self.integer("caption_channels") * int(connectors.get("text_proj_in_factor", _TEXT_LAYERS))

    @property
    def compression(self) -> tuple[int, int]:
        temporal, spatial, _ = self.config.get("vae_scale_factors", (8, 32, 32))
        return temporal, spatial

    @property
    def modulations(self) -> tuple[str, ...]:
        """What the front makes of the timestep for the blocks."""
        kinds = ("temb", "cross_temb", "cross_gate", *(["prompt_temb"] if self._modulates_text else []))
        return tuple(f"{stream}{kind}" for stream in STREAMS for kind in kinds)

    @property
    def _embedded(self) -> tuple[str, ...]:
        """And for the heads."""
        return tuple(f"{stream}embedded_timestep" for stream in STREAMS)

    def sizes(self, workload: Workload) -> dict[str, _Sizes]:
        """Of video and sound."""
        heads = self.integer("audio_num_attention_heads")
        width = heads * self.integer("audio_attention_head_dim")
        return {
            VIDEO: _Sizes(self.tokens(workload), self.width, self.integer("num_attention_heads")),
            SOUND: _Sizes(workload.audio_num_frames, width, heads),
        }

    def audio_num_frames(self, num_frames: int, frame_rate: float) -> int:
        config = self.config
        per_second: float = config["audio_sampling_rate"] / config["audio_hop_length"]
        per_second /= config["audio_scale_factor"]
        return round(num_frames / frame_rate * per_second)

    def check(self, workload: Workload) -> None:
        newer = not self.config.get("use_prompt_adaln_single", True) or not self.config.get("ff_bias", True)
        if newer or self.config.get("use_keyframes_abs_pos_embedding"):
            raise InvalidRequest(
                "checkpoint: expected LTX-2 or LTX-2.3, got a transformer/config.json of LTX-2.5: use one of "
                "the others"
            )
        for name in ("patch_size", "patch_size_t", "audio_patch_size", "audio_patch_size_t"):
            _check_entry(name, self.config.get(name, 1), 1)
        _check_entry("rope_type", self.config.get("rope_type", "split"), "split")
        super().check(workload)
        registers = (self.connectors_config or {}).get("video_connector_num_learnable_registers")
        if registers and workload.text_length % registers:
            raise InvalidRequest(
                f"text_length: expected a multiple of {registers}, as many as connectors/ has registers, got "
                f"{workload.text_length}: use {-(-workload.text_length // registers) * registers}"
            )
        if workload.audio_num_frames < 1:
            raise InvalidRequest(
                f"frame_rate: expected at least one latent of sound for {workload.num_frames} frames, got "
                "none: use a lower frame rate"
            )

    def own_tensors(self, workload: Workload) -> tuple[TensorSpec, ...]:
        dtype, text = workload.dtype, workload.text_length
        caption = self.integer("caption_channels")
        specs = [*token_timestep_specs(self.tokens(workload), _TIMESTEP_PLACES)]
        for stream, size in self.sizes(workload).items():
            places = _TIMESTEP_PLACES if stream == VIDEO else 1
            channels = (self.integer(f"{stream}{side}_channels") for side in ("in", "out"))
            taken, given = (TensorSpec("", dtype, (ROWS, size.tokens, count)) for count in channels)
            float32 = {
                "temb": (ROWS, places, 9 if self._modulates_text else 6, size.width),
                "cross_temb": (ROWS, places, 4, size.width),
                "cross_gate": (ROWS, 1, 1, size.width),
                "prompt_temb": (ROWS, 1, 2, size.width),
                "embedded_timestep": (ROWS, places, size.width),
                **dict.fromkeys(("rope_cos", "rope_sin"), (size.tokens, size.width // 2)),
                **dict.fromkeys(("cross_rope_cos", "cross_rope_sin"), (size.tokens, self._cross_width // 2)),
            }
            specs += [TensorSpec(f"{stream}{name}", "float32", shape) for name, shape in float32.items()]
            specs += [
                replace(taken, name=f"{stream}latents"),
                replace(given, name=f"{stream}pred"),
                TensorSpec(f"{stream}hidden_states", dtype, (ROWS, size.tokens, size.width)),
                TensorSpec(f"{stream}text", dtype, (ROWS, text, size.width)),
                TensorSpec(_PROMPTS[stream], dtype, (ROWS, text, caption)),
            ]
        return (*specs, keep_audio_attention_spec(), keep_cross_spec())

    @property
    def _cross_width(self) -> int:
        """Channels in which the streams attend to each other."""
        return self.integer("audio_cross_attention_dim")

    def borders(self, segment: Segment) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if segment.text:
            return (*_PROMPTS.values(),), ("text", "audio_text")
        made: tuple[str, ...] = self.modulations
        constants: tuple[str, ...] = ()
        if segment.blocks:
            constants = (*made, "text", "audio_text", *_ROPE, *_CROSS_ROPE, TIMESTEP_INDEX, KEEP_CROSS)
        skipped = segment.skipped
        if skipped is not None and skipped.blocks == tuple(segment.blocks):
            unused = _ROPE if skipped.mode == "stg-a" else constants
            constants = tuple(name for name in constants if name not in unused)
        if segment.back and TIMESTEP_INDEX not in constants:
            constants += (TIMESTEP_INDEX,)
        if segment.keep_input:
            constants += (KEEP_ATTENTION, KEEP_AUDIO_ATTENTION)
        hidden, embedded = ("hidden_states", "audio_hidden_states"), self._embedded
        if segment.front:
            constants = tuple(name for name in constants if name not in made)
            inputs = ("latents", "audio_latents", TIMESTEP_LIMITS, "timestep", *constants)
        else:
            inputs = (*hidden, *constants, *(embedded if segment.back else ()))
        if segment.back:
            return inputs, ("pred", "audio_pred")
        return inputs, (*hidden, *made, *embedded) if segment.front else hidden

    def text_module(self, transformer: Any, *borders: Any) -> SegmentModule:
        projections = transformer.caption_projection, transformer.audio_caption_projection
        return TextProjections(*projections, *borders)

    def position_tables(
        self, workload: Workload, frame_rate: float, placed: Places = ()
    ) -> dict[str, Tensor]:
        _, frames, height, width = self.latent_shape(workload)
        longest = {VIDEO: self.config["pos_embed_max_pos"], SOUND: self.config["audio_pos_embed_max_pos"]}
        tables: dict[str, Tensor] = {}
        for stream, size in self.sizes(workload).items():
            own = self._rope(stream, size.width, longest[stream])
            across = self._rope(stream, self._cross_width, max(longest.values()))
            cpu = torch.device("cpu")
            places = (
                own.prepare_video_coords(1, frames, height, width, cpu, fps=frame_rate)
                if stream == VIDEO
                else own.prepare_audio_coords(1, workload.audio_num_frames, cpu)
            )
            tables |= _named(f"{stream}rope", own(places))
            # In time alone, which both streams have.
            tables |= _named(f"{stream}cross_rope", across(places[:, :1]))
        return tables

    def _rope(self, stream: str, width: int, longest: int) -> Any:
        """diffusers' tables of as many channels, for positions up to `longest` seconds."""
        from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed

        config, is_video = self.config, stream == VIDEO
        return LTX2AudioVideoRotaryPosEmbed(
            dim=width,
            base_num_frames=longest,
            base_height=config["base_height"],
            base_width=config["base_width"],
            sampling_rate=config["audio_sampling_rate"],
            hop_length=config["audio_hop_length"],
            scale_factors=tuple(config["vae_scale_factors"]) if is_video else (config["audio_scale_factor"],),
            theta=config["rope_theta"],
            causal_offset=config["causal_offset"],
            modality="video" if is_video else "audio",
            double_precision=config["rope_double_precision"],
            rope_type="split",
            num_attention_heads=config[f"{stream}num_attention_heads"],
        )

    def timestep_tables(self, workload: Workload, image: ImageCondition | None) -> dict[str, Tensor]:
        clean = None if image is None else image.clean
        strengths = torch.zeros(self.tokens(workload)) if clean is None else clean.strength.flatten()
        return timestep_tables(strengths, _TIMESTEP_PLACES)

    def random_image(self, workload: Workload, rows: int, generator: torch.Generator) -> ImageCondition:
        """The first frame clean, so that both kinds of timesteps are compared."""
        strength = torch.zeros(self.tokens(workload), 1)
        strength[: self.tokens(workload) // self.grid(workload)[0]] = 1
        return ImageCondition(clean=CleanLatents(strength))

    def encode_images(
        self, pipeline: Any, images: Images, workload: Workload, videos: int, generator: Any
    ) -> ImageCondition:
        return encode_picture(pipeline, images, workload, self.latent_shape(workload), videos)

    def text_inputs(self, text: TextCondition, workload: Workload) -> dict[str, Tensor]:
        assert text.audio is not None
        names = _PROMPTS if self.has_text_segment else {VIDEO: "text", SOUND: "audio_text"}
        return {names[VIDEO]: text.embeds, names[SOUND]: text.audio}

    def random_text(self, workload: Workload, rows: int, generator: torch.Generator) -> TextCondition:
        """As the connectors make it: no padding is left."""
        specs = self.tensors(workload)
        names = _PROMPTS.values() if self.has_text_segment else ("text", "audio_text")
        video, sound = (torch.randn(specs[name].with_rows(rows), generator=generator) for name in names)
        return TextCondition(video, torch.ones(video.shape[:2]), audio=sound)

    def segment_flops(self, segment: Segment, workload: Workload) -> int:
        return segment_flops(self._costs(workload), segment)

    def _costs(self, workload: Workload) -> Costs:
        streams = [
            StreamCosts(
                tokens=size.tokens,
                width=size.width,
                heads=size.heads,
                in_channels=self.integer(f"{stream}in_channels"),
                out_channels=self.integer(f"{stream}out_channels"),
                places=_TIMESTEP_PLACES if stream == VIDEO else 1,
            )
            for stream, size in self.sizes(workload).items()
        ]
        return Costs(
            (streams[0], streams[1]),
            text_length=workload.text_length,
            caption_channels=self.integer("caption_channels"),
            cross_width=self._cross_width,
            timestep_channels=self.timestep_channels,
            gated=bool(self.config.get("gated_attn")),
            modulates_text=self._modulates_text,
        )

    def attentions(self, segment: Segment) -> int:
        skipped = segment.skipped.blocks if segment.skipped else ()
        per_skipped = 4 if segment.skipped and segment.skipped.mode == "stg-a" else 0
        return sum(per_skipped if block in skipped else 6 for block in segment.blocks)

    def activation_limit(self, segment: Segment, workload: Workload, rows: int) -> int:
        # Widest point: the modulation of every token, q, k, v and the hidden states, and the feed-forward.
        channels = 24 * self.width + self.feed_forward_width
        return rows * (self.tokens(workload) + workload.text_length) * channels * 4 + (8 << 20)

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, workload: Workload) -> None:
        set_even_sigmas(scheduler, num_inference_steps, self.shift(scheduler, workload))

    def shift(self, scheduler: Any, workload: Workload) -> dict[str, float]:
        return _SHIFT.of(scheduler, self.tokens(workload))

    def pack(self, latents: Tensor) -> Tensor:
        packed: Tensor = load_class(_PIPELINE)._pack_latents(latents)
        return packed

    def audio_noise_shape(self, workload: Workload) -> tuple[int, ...]:
        vae_channels = 8
        return vae_channels, workload.audio_num_frames, self.integer("audio_in_channels") // vae_channels

    def pack_audio(self, latents: Tensor) -> Tensor:
        packed: Tensor = load_class(_PIPELINE)._pack_audio_latents(latents)
        return packed

    def text_tokens(self, pipeline: Any, prompt: str) -> int:
        return count_tokens(pipeline, prompt)

    def encode_prompt(self, pipeline: Any, prompts: list[str], workload: Workload) -> TextCondition:
        return encode_prompt(pipeline, prompts, workload)

    def vae_latents(self, pipeline: Any, latents: Tensor, workload: Workload) -> Tensor:
        _, *grid = self.latent_shape(workload)
        return denormalized(pipeline, pipeline._unpack_latents(latents, *grid))

    def decode(self, pipeline: Any, latents: Tensor, workload: Workload, **options: Any) -> Iterator[Tensor]:
        """`decode_timestep` and `decode_noise_scale` are LTX2Pipeline's: one number, or one per video."""
        _, frames, height, width = self.latent_shape(workload)
        return decode_frames(pipeline, latents, (frames, height, width), options)


def _named(name: str, tables: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Cosines and sines (1, heads, tokens, channels / 2) as (tokens, all channels / 2)."""
    cos, sin = (table[0].transpose(0, 1).flatten(1).contiguous() for table in tables)
    return {f"{name}_cos": cos, f"{name}_sin": sin}


def _check_entry(name: str, value: object, published: object) -> None:
    if value != published:
        raise InvalidRequest(
            f"checkpoint: expected {name} {published} in transformer/config.json, as in every published "
            f"LTX-2, got {value!r}: use a published checkpoint"
        )
