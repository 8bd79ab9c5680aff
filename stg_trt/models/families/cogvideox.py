"""CogVideoX, 2B, 5B and 1.5-5B: a joint-attention DiT over patches of 1x2x2 or 2x2x2 latents.

Reproduces diffusers' CogVideoXTransformer3DModel, CogVideoXPipeline and CogVideoXImageToVideoPipeline, whose
latents have frames before channels. Constant over the steps: the projected text, whose padding is not masked;
the positions, which 2B adds to the video tokens as sines and cosines, where 5B and 1.5 have RoPE tables; and
for image-to-video the picture's latents, further channels of the first frame, and learned positions of 5B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stg_trt.errors import InvalidRequest
from stg_trt.models.defaults import Defaults
from stg_trt.models.families.base import CONDITION
from stg_trt.models.families.dit import State, gated, half_table, rotate
from stg_trt.models.families.joint_attention import QKV, JointAttentionDiT, JointAttentionSegment, modulation
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.image import ImageCondition, Images, Places, posterior_samples
from stg_trt.models.tensor_spec import ROWS, TensorSpec
from stg_trt.models.text import TextCondition
from stg_trt.models.workload import Workload

_ROPE = ("rope_cos", "rope_sin")
# Of the published VAE; each level but the first halves height and width.
_VAE_CHANNELS = (128, 256, 256, 512)
# What diffusers' pipeline gives 1.5 for image-to-video as `ofs`.
_OFFSET = 2.0


class CogVideoXSegment(JointAttentionSegment):
    """CogVideoXBlocks: both streams share all weights except their modulation; norms in float32."""

    def take_embedding(self, transformer: Any) -> None:
        self.patch_embedding = transformer.patch_embed.proj
        self.time_proj, self.time_embedding = transformer.time_proj, transformer.time_embedding
        learned = learned_positions(transformer)
        self.positions = None if learned is None else nn.Parameter(learned[1], requires_grad=False)
        self.offset = None
        if (embedding := transformer.ofs_embedding) is not None:
            embedded = embedding(transformer.ofs_proj(torch.tensor([_OFFSET])))
            self.offset = nn.Parameter(embedded, requires_grad=False)

    def take_head(self, transformer: Any) -> None:
        self.norm_final, self.norm_out = transformer.norm_final, transformer.norm_out
        self.proj_out = transformer.proj_out

    def latent_grid(self, latents: Tensor) -> tuple[int, ...]:
        frames, _, height, width = latents.shape[1:]
        return tuple(size // patch for size, patch in zip((frames, height, width), self.patch, strict=True))

    def embed(self, state: State) -> State:
        latents = state["latents"]
        if CONDITION in state:
            latents = torch.cat([latents, state[CONDITION]], 2)
        hidden, positions = self.tokens(latents), state.get("positions", self.positions)
        if positions is not None:
            hidden = hidden + positions
        temb = self.time_embedding(self.time_proj(state["timestep"]))
        embedded = {"hidden_states": hidden, "temb": temb if self.offset is None else temb + self.offset}
        return embedded | ({"encoder_hidden_states": state["text"]} if "text" in state else {})

    def tokens(self, latents: Tensor) -> Tensor:
        """Projected patches (rows, tokens, channels) of latents (rows, frames, channels, height, width)."""
        frames, rows, columns = self.patch
        if isinstance(self.patch_embedding, torch.nn.Conv2d):
            patches = self.patch_embedding(latents.flatten(0, 1)).unflatten(0, (-1, latents.shape[1]))
            in_frames: Tensor = patches.flatten(3).transpose(2, 3)
            return in_frames.flatten(1, 2)
        split = latents.permute(0, 1, 3, 4, 2).unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
        # (rows, tokens in time, latents in time, height, latents, width, latents, channels)
        patches = split.unflatten(1, (-1, frames)).permute(0, 1, 3, 5, 7, 2, 4, 6)
        tokens: Tensor = self.patch_embedding(patches.flatten(4, 7).flatten(1, 3))
        return tokens

    def block(self, block: Any, state: State, perturbed: bool) -> State:
        video, text = state["hidden_states"], state["encoder_hidden_states"]
        normed, gates = self.modulated(block.norm1, video, text, state["temb"])
        rope = (state[_ROPE[0]], state[_ROPE[1]]) if _ROPE[0] in state else None
        of_video, of_text = self.qkv(block.attn1, normed[0], rope), self.qkv(block.attn1, normed[1], None)
        attended = self.joint_attention(of_video, of_text, state, perturbed)
        project = block.attn1.to_out[0]
        video, text = (
            gated(video, project(attended[0]), gates[0]),
            gated(text, project(attended[1]), gates[1]),
        )
        normed, gates = self.modulated(block.norm2, video, text, state["temb"])
        return {
            "hidden_states": gated(video, block.ff(normed[0]), gates[0]),
            "encoder_hidden_states": gated(text, block.ff(normed[1]), gates[1]),
        }

    def modulated(
        self, norm: Any, video: Tensor, text: Tensor, temb: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Both streams normed, shifted and scaled in float32, in the compute dtype again, and their gates."""
        shift, scale, gate, text_shift, text_scale, text_gate = modulation(norm.linear, temb).chunk(6, -1)
        normed_video = layer_norm(norm.norm, video) * (1 + scale) + shift
        normed_text = layer_norm(norm.norm, text) * (1 + text_scale) + text_shift
        return (normed_video.to(video.dtype), normed_text.to(text.dtype)), (gate, text_gate)

    def qkv(self, attn: Any, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> QKV:
        """One stream's heads: layer norm of each head's queries and keys, then RoPE, in float32."""
        heads = [project(x).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)]
        query, key = layer_norm(attn.norm_q, heads[0]), layer_norm(attn.norm_k, heads[1])
        if rope is not None:
            cos, sin = (table[:, None] for table in rope)
            query, key = rotate(query, cos, sin, x.dtype), rotate(key, cos, sin, x.dtype)
        query, key, value = (y.to(x.dtype).transpose(1, 2) for y in (query, key, heads[2]))
        return QKV(query, key, value)

    def head(self, state: State) -> Tensor:
        hidden = state["hidden_states"]
        shift, scale = modulation(self.norm_out.linear, state["temb"]).chunk(2, -1)
        normed = layer_norm(self.norm_out.norm, layer_norm(self.norm_final, hidden)) * (1 + scale) + shift
        pred: Tensor = self.proj_out(normed.to(hidden.dtype))
        return pred

    def unpatch(self, pred: Tensor, grid: tuple[int, ...]) -> Tensor:
        patches = pred.unflatten(2, (-1, *self.patch)).unflatten(1, grid)
        # (rows, tokens in time, latents in time, channels, height, latents, width, latents)
        frames_first = patches.permute(0, 1, 5, 4, 2, 6, 3, 7)
        latents: Tensor = frames_first.flatten(6, 7).flatten(4, 5).flatten(1, 2)
        return latents


class CogVideoXText(SegmentModule):
    """The projected prompt, with the positions that some checkpoints learned for it."""

    def __init__(self, transformer: Any, *borders: Any) -> None:
        super().__init__(*borders)
        self.projection = transformer.patch_embed.text_proj
        learned = learned_positions(transformer)
        self.positions = None if learned is None else nn.Parameter(learned[0], requires_grad=False)

    def run(self, tensors: State) -> State:
        text = self.projection(tensors["prompt_embeds"])
        return {"text": text if self.positions is None else text + self.positions}


def learned_positions(transformer: Any) -> tuple[Tensor, Tensor] | None:
    """The learned positions of text and video tokens, (1, tokens, channels) each, if there are any."""
    if not transformer.config.use_learned_positional_embeddings:
        return None
    embed = transformer.patch_embed
    text, video = embed.pos_embedding.tensor_split([embed.max_text_seq_length], dim=1)
    return text, video


class CogVideoX(JointAttentionDiT):
    """CogVideoX as diffusers has it (THUDM, arXiv 2408.06072)."""

    name = "cogvideox"
    transformer_class = "CogVideoXTransformer3DModel"
    export_version = 1
    pipeline_class = "CogVideoXPipeline"
    has_text_mask = False
    blocks_name = "transformer_blocks"
    text_constants = ("text",)
    # Timestep MLP, the head's modulation and the norms, which are applied in float32.
    float32_islands = r"time_embedding\.|norm_final\.|norm_out\.|\.norm\.|norm_q\.|norm_k\."
    segment_class = CogVideoXSegment
    defaults = Defaults(
        stg_mode="stg-r",
        stg_blocks=(11,),
        stg_scale=1.0,
        guidance_scale=6.0,
        rescale=0.0,
        num_inference_steps=50,
        frame_rate=8.0,
        text_length=226,
    )

    def __init__(self, *configs: Any) -> None:
        super().__init__(*configs)
        self.rotary = bool(self.config.get("use_rotary_positional_embeddings"))
        self.block_constants = _ROPE if self.rotary else ()
        takes_image = self.config.get("in_channels") != self.config.get("out_channels")
        self.images_in = (CONDITION,) if takes_image else ()
        self.video_constants = self.images_in if self.rotary else (*self.images_in, "positions")
        if takes_image:
            self.pipeline_class = "CogVideoXImageToVideoPipeline"

    @property
    def latent_channels(self) -> int:
        return self.integer("out_channels")

    @property
    def needed_images(self) -> tuple[str, ...]:
        return ("image",) if self.images_in else ()

    @property
    def feed_forward_width(self) -> int:
        return 4 * self.width

    @property
    def text_channels(self) -> int:
        return self.integer("text_embed_dim")

    @property
    def timestep_channels(self) -> int:
        return self.width

    @property
    def compression(self) -> tuple[int, int]:
        channels = (self.vae_config or {}).get("block_out_channels", _VAE_CHANNELS)
        return self.vae_integer("temporal_compression_ratio", 4), 2 ** (len(channels) - 1)

    @property
    def patch(self) -> tuple[int, int, int]:
        # The first checkpoints have no entry for time.
        frames = 1 if self.config.get("patch_size_t") is None else self.integer("patch_size_t")
        return frames, self.integer("patch_size"), self.integer("patch_size")

    def latent_shape(self, workload: Workload) -> tuple[int, int, int, int]:
        channels, frames, height, width = super().latent_shape(workload)
        # 1.5 pads the frames in front to whole patches.
        return channels, frames + -frames % self.patch[0], height, width

    def noise_shape(self, workload: Workload) -> tuple[int, ...]:
        channels, frames, height, width = self.latent_shape(workload)
        return frames, channels, height, width

    def check(self, workload: Workload) -> None:
        self._check_channels()
        super().check(workload)
        length = self.integer("max_text_seq_length")
        if workload.text_length != length:
            raise InvalidRequest(
                f"text_length: expected {length}, of which the model reads every token, got "
                f"{workload.text_length}: use {length}"
            )
        if self.config.get("use_learned_positional_embeddings"):
            self._check_learned_size(workload)
        if self.patch[0] == 1:
            return
        # 1.5 takes its positions from tables of the sizes it was trained on.
        _, *tokens = self.grid(workload)
        _, spatial = self.compression
        for side, got, size in zip(("height", "width"), tokens, self.patch[1:], strict=True):
            most = self.integer(f"sample_{side}") // size
            if got > most:
                raise InvalidRequest(
                    f"{side}: expected at most {most * size * spatial}, the end of the position tables, "
                    f"got {getattr(workload, side)}: use {most * size * spatial}"
                )

    def own_tensors(self, workload: Workload) -> tuple[TensorSpec, ...]:
        tokens, latents = self.tokens(workload), self.noise_shape(workload)
        text = (ROWS, workload.text_length, self.width)
        table = (tokens, self.integer("attention_head_dim") // 2)
        positions = (
            tuple(TensorSpec(name, "float32", table) for name in _ROPE)
            if self.rotary
            else (TensorSpec("positions", workload.dtype, (tokens, self.width)),)
        )
        return (
            TensorSpec("latents", workload.dtype, (ROWS, *latents)),
            *(TensorSpec(name, workload.dtype, (ROWS, *latents)) for name in self.images_in),
            TensorSpec("hidden_states", workload.dtype, (ROWS, *self.grid(workload), self.width)),
            TensorSpec("encoder_hidden_states", workload.dtype, text),
            TensorSpec("temb", "float32", (ROWS, self.integer("time_embed_dim"))),
            TensorSpec("text", workload.dtype, text),
            *positions,
            TensorSpec("pred", workload.dtype, (ROWS, *latents)),
        )

    def text_module(self, transformer: Any, *borders: Any) -> SegmentModule:
        return CogVideoXText(transformer, *borders)

    def position_tables(
        self, workload: Workload, frame_rate: float, placed: Places = ()
    ) -> dict[str, Tensor]:
        """CogVideoX's positions do not depend on the frame rate."""
        return self._rope(workload) if self.rotary else {"positions": self._positions(workload)}

    def text_inputs(self, text: TextCondition, workload: Workload) -> dict[str, Tensor]:
        """The embeddings, padding included."""
        return {"prompt_embeds": text.embeds}

    def encode_images(
        self, pipeline: Any, images: Images, workload: Workload, videos: int, generator: Any
    ) -> ImageCondition:
        """Samples of the pictures' latents in the first frame, zeros in the others."""
        vae, frames = pipeline.vae, self.noise_shape(workload)[0]
        pixels = pipeline.video_processor.preprocess([*images.image], workload.height, workload.width)
        latents = posterior_samples(vae, pixels.to(vae.device, vae.dtype).unsqueeze(2), videos, generator)
        scale = vae.config.scaling_factor
        # 1.5 inverts it: its training left the factor out.
        scaled = latents / scale if vae.config.invert_scale_latents else latents * scale
        return ImageCondition(F.pad(scaled.transpose(1, 2), (0, 0, 0, 0, 0, 0, 0, frames - 1)))

    def text_flops(self, workload: Workload) -> int:
        return 2 * workload.text_length * self.text_channels * self.width

    def front_flops(self, workload: Workload) -> int:
        embedded = self.integer("time_embed_dim")
        patches = (2 + 2 * len(self.images_in)) * self.tokens(workload) * self._patch_values * self.width
        return patches + 2 * embedded * (self.timestep_channels + embedded)

    def block_flops(self, block: int, workload: Workload) -> int:
        tokens, width = self.tokens(workload) + workload.text_length, self.width
        modulation = 2 * 2 * self.integer("time_embed_dim") * 6 * width
        return modulation + 2 * tokens * width * (4 * width + 2 * self.feed_forward_width)

    def back_flops(self, workload: Workload) -> int:
        patches = 2 * self.tokens(workload) * self.width * self._patch_values
        return patches + 2 * self.integer("time_embed_dim") * 2 * self.width

    def check_text(self, text: TextCondition) -> None:
        fewest = int(text.mask.sum(1).min())
        if fewest < text.mask.shape[1]:
            raise InvalidRequest(
                f"prompt_embeds: expected {text.mask.shape[1]} tokens without a mask, of which the model "
                f"reads every one, got {fewest}: pad the prompt before it is encoded"
            )

    def takes_timesteps(self, scheduler: Any) -> bool:
        return True

    def encode_prompt(self, pipeline: Any, prompts: list[str], workload: Workload) -> TextCondition:
        embeds, _ = pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=workload.text_length,
            device=pipeline.text_encoder.device,
        )
        return TextCondition(embeds, embeds.new_ones(embeds.shape[:2]))

    def vae_latents(self, pipeline: Any, latents: Tensor, workload: Workload) -> Tensor:
        vae, frames = pipeline.vae, super().latent_shape(workload)[1]
        kept = latents[:, -frames:].to(vae.dtype).transpose(1, 2)
        return kept / vae.config.scaling_factor  # type: ignore[no-any-return]

    @property
    def _patch_values(self) -> int:
        """Latent values per token."""
        frames, rows, columns = self.patch
        return self.latent_channels * frames * rows * columns

    def _positions(self, workload: Workload) -> Tensor:
        """The positions that 2B adds to its tokens, (tokens, channels)."""
        from diffusers.models.embeddings import get_3d_sincos_pos_embed

        frames, rows, columns = self.grid(workload)
        table: Tensor = get_3d_sincos_pos_embed(
            self.width,
            (columns, rows),
            frames,
            self.config["spatial_interpolation_scale"],
            self.config["temporal_interpolation_scale"],
            output_type="pt",
        )
        return table.flatten(0, 1).float()

    def _rope(self, workload: Workload) -> dict[str, Tensor]:
        """The tables of CogVideoXPipeline: 5B stretches the trained grid over the size, 1.5 cuts it."""
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        frames, *size = self.grid(workload)
        _, patch_rows, patch_columns = self.patch
        trained = self.integer("sample_height") // patch_rows, self.integer("sample_width") // patch_columns
        if self.patch[0] == 1:
            crop = get_resize_crop_region_for_grid(tuple(size), trained[1], trained[0])
            kind = {"crops_coords": crop}
        else:
            kind = {"crops_coords": None, "grid_type": "slice", "max_size": trained}
        tables = get_3d_rotary_pos_embed(
            self.integer("attention_head_dim"), grid_size=tuple(size), temporal_size=frames, **kind
        )
        return dict(zip(_ROPE, map(half_table, tables), strict=True))

    def _check_channels(self) -> None:
        out = self.integer("out_channels")
        if (channels := self.integer("in_channels")) not in (out, 2 * out):
            raise InvalidRequest(
                f"checkpoint: expected in_channels {out} in transformer/config.json, as out_channels, or "
                f"{2 * out} for image-to-video, got {channels}: download it again"
            )

    def _check_learned_size(self, workload: Workload) -> None:
        """Raises InvalidRequest for another size than that of the learned positions."""
        temporal, spatial = self.compression
        height, width, frames = (self.integer(f"sample_{side}") for side in ("height", "width", "frames"))
        sizes = height * spatial, width * spatial, (frames - 1) // temporal * temporal + 1
        for side, size in zip(("height", "width", "num_frames"), sizes, strict=True):
            if (got := getattr(workload, side)) != size:
                raise InvalidRequest(
                    f"{side}: expected {size}, the size of the learned positions, got {got}: use {size}"
                )


def layer_norm(norm: Any, x: Tensor) -> Tensor:
    """Layer norm over the last dimension, in float32."""
    return F.layer_norm(x.float(), (x.shape[-1],), norm.weight, norm.bias, norm.eps)
