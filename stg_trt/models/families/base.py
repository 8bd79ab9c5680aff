"""The interface of a model family to the rest of the library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stg_trt.models.config_file import positive_integer
from stg_trt.models.custom_steps import CustomSteps
from stg_trt.models.defaults import Defaults
from stg_trt.models.families.segment_module import SegmentModule
from stg_trt.models.float8 import Float8Rule
from stg_trt.models.image import ImageCondition, Images, Places
from stg_trt.models.segment import Segment, cut
from stg_trt.models.sound import SoundDecoder
from stg_trt.models.stream import VIDEO, RescaleSpace, Stream
from stg_trt.models.tensor_spec import TensorSpec, index_of
from stg_trt.models.text import Connector, TextCondition
from stg_trt.models.workload import Workload

CONDITION = "condition"
IMAGE_EMBEDS = "image_embeds"
POOLED = "pooled_prompt_embeds"


class ModelFamily(ABC):
    """All that is known of one model family; one instance per checkpoint's configuration."""

    name: str
    transformer_class: ClassVar[str]
    # Raised when the graphs of the family's segments change: engines of another number are built again.
    export_version: ClassVar[int]
    pipeline_class: str
    defaults: Defaults
    has_text_segment: bool
    # False if diffusers' pipeline takes embeddings without a mask; their padding is zeros.
    has_text_mask: ClassVar[bool] = True
    # False if there is no prompt: the pictures say what is made.
    reads_text: ClassVar[bool] = True
    takes_lora: ClassVar[bool] = True
    # The weight that embeds no text, if that is not what the text encoder makes of an empty one.
    null_text: ClassVar[str | None] = None
    # Where the model's configuration lies in a checkpoint.
    config_file: ClassVar[str] = "transformer/config.json"
    # Whether a run of blocks may be several engines.
    splits_runs: ClassVar[bool] = True
    # Arguments of a call that say how its pictures are seen, see ImageOptions.
    image_options: frozenset[str] = frozenset()
    # Whether the pipeline in diffusers calls CFG true_cfg_scale, and an input of the model guidance_scale.
    takes_true_cfg: ClassVar[bool] = False
    # The entries of the transformer's config.json that count blocks, in the order of their numbers.
    block_counts: ClassVar[tuple[str, ...]] = ("num_layers",)
    # Weights of no block that every block reads.
    shared_weights: ClassVar[frozenset[str]] = frozenset()
    # Pictures that a call may give and needs not; whether it may give some for any frame.
    optional_images: tuple[str, ...] = ()
    takes_conditions: bool = False
    # Whether diffusers' pipeline draws noise before what it draws for pictures, and runs a call's latents as
    # they are beside a picture.
    draws_noise_first: bool = False
    starts_from_given_latents: bool = False
    # Parts of a checkpoint with which its text encoder sees the pictures too.
    text_image_parts: tuple[str, ...] = ()
    # What stands between text encoder and transformer, and what makes the sound, if the model has them.
    connector: ClassVar[Connector | None] = None
    sound_decoder: ClassVar[SoundDecoder | None] = None
    # Parts of the pipeline that are to run in float32 on a GPU too.
    float32_components: ClassVar[frozenset[str]] = frozenset()
    decode_options: ClassVar[frozenset[str]] = frozenset()
    # What it denoises side by side; whether a pass hides them from each other; what its pipeline rescales.
    streams: ClassVar[tuple[Stream, ...]] = (VIDEO,)
    isolates: ClassVar[bool] = False
    rescale_space: ClassVar[RescaleSpace] = "prediction"
    # TensorRT plugins that can replace a part of the blocks, and what FP8 builds keep; None: there are none.
    plugins: ClassVar[frozenset[str]] = frozenset()
    float8: ClassVar[Float8Rule | None] = None

    def __init__(
        self,
        config: Mapping[str, Any],
        vae_config: Mapping[str, Any] | None = None,
        model_index: Mapping[str, Any] | None = None,
        origin: str = "",
        image_encoder_config: Mapping[str, Any] | None = None,
        connectors_config: Mapping[str, Any] | None = None,
    ) -> None:
        # Not copied: a checkpoint's configuration says which file lacks an entry.
        self.config = config
        self.vae_config = vae_config
        self.model_index = model_index or {}
        self.origin = origin
        self.image_encoder_config = image_encoder_config
        self.connectors_config = connectors_config

    def network_class(self) -> Any:
        """The class of the whole network: diffusers', unless the family has its own."""
        return load_class(self.transformer_class)

    def pipeline_type(self) -> Any:
        """The class that holds text encoders, tokenizers and VAE: diffusers', or the family's own."""
        return load_class(self.pipeline_class)

    def own_vae_class(self) -> Any:
        """The class of the VAE if it is not diffusers', else None."""
        return None

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Blocks that can be perturbed, numbered from 0."""

    @property
    def embedded_guidance(self) -> float | None:
        """The default of the guidance that the model takes as an input; None if it takes none."""
        return self.defaults.embedded_guidance

    @property
    def transformers(self) -> tuple[str, ...]:
        """The checkpoint's parts of which one predicts at each step: experts, whose graphs are the same."""
        return ("transformer",)

    def experts(self, timesteps: Sequence[float], training_steps: int) -> tuple[int, ...]:
        """Which of `transformers` predicts at each of a run's timesteps, which count training steps."""
        return (0,) * len(timesteps)

    @abstractmethod
    def block_of(self, weight_name: str) -> int | None:
        """The block that a weight of the transformer belongs to; None for embedding and head."""

    @abstractmethod
    def check(self, workload: Workload) -> None:
        """Raises InvalidRequest for a configuration that is not the family's or sizes it cannot have."""

    def check_pipeline(self) -> None:
        """Raises InvalidRequest if model_index.json is that of a variant which is not the family's."""
        return

    @abstractmethod
    def tokens(self, workload: Workload) -> int:
        """Video tokens."""

    def segments(self, layout: str, mode: str, blocks: tuple[int, ...]) -> tuple[Segment, ...]:
        """The segments of a layout, see `cut`; the projection of the prompt is not among them."""
        return cut(layout, self.num_blocks, mode, blocks)

    @abstractmethod
    def tensors(self, workload: Workload) -> dict[str, TensorSpec]:
        """Every tensor that may cross a segment's border, by name."""

    @abstractmethod
    def borders(self, segment: Segment) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of a segment's inputs and outputs."""

    @abstractmethod
    def module(self, transformer: nn.Module, segment: Segment, *, expand_masks: bool) -> SegmentModule:
        """The segment over the weights of a diffusers transformer, as they are (float32)."""

    @abstractmethod
    def lower_precision(self, module: SegmentModule, dtype: torch.dtype) -> None:
        """Casts a segment's weights in place, except its float32 islands."""

    @abstractmethod
    def segment_flops(self, segment: Segment, workload: Workload) -> int:
        """Floating-point operations of a segment for one row (2 per multiply-add, attention 4*N*S*C)."""

    @abstractmethod
    def attentions(self, segment: Segment) -> int:
        """How many attention kernels the compiled segment must hold."""

    @abstractmethod
    def activation_limit(self, segment: Segment, workload: Workload, rows: int) -> int:
        """Bytes of activation memory that grow linearly with tokens; above it an S x S buffer is live."""

    def check_text(self, text: TextCondition) -> None:
        """Raises InvalidRequest for embeddings that the model has no use for."""
        return

    @abstractmethod
    def position_tables(
        self, workload: Workload, frame_rate: float, placed: Places = ()
    ) -> dict[str, Tensor]:
        """Tensors that depend on sizes, frame rate and `placed` alone; all rows share them.

        `placed` are the frames from which pictures stand that are tokens beside the video's, and how many
        latent frames each has.
        """

    @abstractmethod
    def text_inputs(self, text: TextCondition, workload: Workload) -> dict[str, Tensor]:
        """Tensors that depend on the prompts, before the text segment: one entry per row of `text`."""

    def image_inputs(self, image: ImageCondition) -> dict[str, Tensor]:
        """Tensors that depend on the pictures: one entry per row of `image`."""
        given = {CONDITION: image.channels, IMAGE_EMBEDS: image.context}
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    def timestep_tables(self, workload: Workload, image: ImageCondition | None) -> dict[str, Tensor]:
        """Which timesteps the network is told for which tokens, if it can be told several; for all rows."""
        return {}

    def start(self, noise: Tensor, image: ImageCondition | None) -> Tensor:
        """The latents that a run starts from, of packed noise."""
        return noise if image is None or image.start is None else image.start.of(noise)

    def finished(self, latents: Tensor, workload: Workload, image: ImageCondition | None) -> Tensor:
        """What the VAE decodes of the latents that the loop ends with, packed like these."""
        return latents

    def returned(self, latents: Tensor, workload: Workload) -> Tensor:
        """Finished latents in the layout in which diffusers' pipeline returns them."""
        return latents

    def shown_frames(self, workload: Workload) -> int:
        """Frames of the finished video."""
        return workload.num_frames

    def condition_frames(self, images: Images, workload: Workload) -> int:
        """The latent frames of pictures for later frames, which are tokens beside the video's."""
        return 0

    def uncond_image(self, image: ImageCondition) -> ImageCondition:
        """What the pass without the prompt sees of the pictures: the same, unless a family says otherwise."""
        return image

    def constants(
        self, text: TextCondition, workload: Workload, frame_rate: float, image: ImageCondition | None = None
    ) -> dict[str, Tensor]:
        """All tensors that stay the same over the steps, before the text segment."""
        return {
            **self.text_inputs(text, workload),
            **({} if image is None else self.image_inputs(image)),
            **self.timestep_tables(workload, image),
            **self.position_tables(workload, frame_rate, () if image is None else image.placed),
        }

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, workload: Workload) -> None:
        """Calls the scheduler's set_timesteps as the family's diffusers pipeline does."""
        scheduler.set_timesteps(num_inference_steps)

    def set_custom_steps(self, scheduler: Any, steps: CustomSteps, workload: Workload) -> None:
        """The same for the steps of a call; raises InvalidRequest if the scheduler has no use for them."""
        steps.set_on(scheduler, **self.shift(scheduler, workload))
        if not self.takes_timesteps(scheduler):
            steps.check_kept(scheduler)

    def takes_timesteps(self, scheduler: Any) -> bool:
        """Whether the pipeline in diffusers runs a call's timesteps, whatever this scheduler makes of them.

        Other pipelines have no such argument or always refuse it. Here they take timesteps if the scheduler
        steps between what the network is told.
        """
        return False

    def steps_per_token(self, scheduler: Any) -> bool:
        """Whether the pipeline steps from the timestep to the next lower sigma, see SolverTable."""
        return False

    def shift(self, scheduler: Any, workload: Workload) -> dict[str, float]:
        """What the pipeline passes to `set_timesteps` beside the steps."""
        return {}

    def prompt_tokens(self, workload: Workload) -> int:
        """The most text tokens that a prompt may take, diffusers' max_sequence_length."""
        return workload.text_length

    def text_tokens(self, pipeline: Any, prompt: str) -> int:
        """How many text tokens the prompt takes."""
        return len(pipeline.tokenizer(prompt).input_ids)

    @abstractmethod
    def encode_prompt(self, pipeline: Any, prompts: list[str], workload: Workload) -> TextCondition:
        """Embeds prompts with the text encoder of a diffusers pipeline."""

    def encode_seen_prompt(
        self, pipeline: Any, prompts: list[str], pictures: Sequence[Any] | None, workload: Workload
    ) -> TextCondition:
        """The same if the text encoder sees a picture for each, or one for all; None for negative prompts."""
        raise TypeError(f"{type(self).__name__} does not define encode_seen_prompt")

    @property
    def needed_images(self) -> tuple[str, ...]:
        """The pictures, by arguments' names, without which the model cannot run; none for text-to-video."""
        return ()

    @property
    def image_parts(self) -> tuple[str, ...]:
        """Parts of the checkpoint, beside the VAE, that see the pictures."""
        return ()

    def encode_images(
        self, pipeline: Any, images: Images, workload: Workload, videos: int, generator: Any
    ) -> ImageCondition:
        """What the pictures add, by a diffusers pipeline's VAE and image encoder.

        Drawn from `generator`, one or one per video, before the noise, if diffusers' pipeline draws it.
        """
        raise TypeError(f"{type(self).__name__} does not define encode_images")

    def given_images(self, images: Images, workload: Workload, videos: int) -> ImageCondition:
        """The same of embeddings and latents that a call gives; raises InvalidRequest for other shapes."""
        raise TypeError(f"{type(self).__name__} does not define given_images")

    @abstractmethod
    def latent_shape(self, workload: Workload) -> tuple[int, int, int, int]:
        """(channels, frames, height, width) of a video's latents before packing."""

    def noise_shape(self, workload: Workload) -> tuple[int, ...]:
        """The shape in which diffusers' pipeline draws a video's noise."""
        return self.latent_shape(workload)

    def pack(self, latents: Tensor) -> Tensor:
        """(videos, *noise_shape) to the layout the transformer takes."""
        return latents

    def audio_num_frames(self, num_frames: int, frame_rate: float) -> int:
        """Latents in time of the sound of a video; 0 without sound."""
        return 0

    def audio_noise_shape(self, workload: Workload) -> tuple[int, ...]:
        """The shape in which diffusers' pipeline draws the noise of a video's sound."""
        raise TypeError(f"{type(self).__name__} does not define audio_noise_shape")

    def pack_audio(self, latents: Tensor) -> Tensor:
        """(videos, *audio_noise_shape) to the layout the transformer takes."""
        raise TypeError(f"{type(self).__name__} does not define pack_audio")

    def check_decode_options(self, options: Mapping[str, Any]) -> None:
        """Raises InvalidRequest, before anything is sampled, for options of `decode` that cannot be used."""
        return

    @abstractmethod
    def vae_latents(self, pipeline: Any, latents: Tensor, workload: Workload) -> Tensor:
        """Packed latents as the VAE takes them: (videos, channels, frames, rows, columns), in its dtype."""

    def decode(self, pipeline: Any, latents: Tensor, workload: Workload, **options: Any) -> Iterator[Tensor]:
        """Packed latents to the VAE's videos, one after the other: (1, 3, frames, height, width) in -1..1."""
        return vae_videos(pipeline.vae, self.vae_latents(pipeline, latents, workload))

    def integer(self, name: str) -> int:
        """A positive integer of the configuration; raises InvalidRequest if it is anything else."""
        return positive_integer(self.config[name], name, self.config_file)

    def inputs(self, segment: Segment, workload: Workload) -> list[TensorSpec]:
        """The segment's input specs, in order; a tensor that is read by an index keeps its own rows."""
        tensors, names = self.tensors(workload), self.borders(segment)[0]
        return [tensors[name].kept if index_of(name) in names else tensors[name] for name in names]

    def outputs(self, segment: Segment, workload: Workload) -> list[TensorSpec]:
        """The segment's output specs, in order."""
        tensors = self.tensors(workload)
        return [tensors[name] for name in self.borders(segment)[1]]

    def random_text(self, workload: Workload, rows: int, generator: torch.Generator) -> TextCondition:
        """Random embeddings; the last quarter is padding, as prompts are shorter than the text length."""
        specs = self.tensors(workload)
        embeds = torch.randn(specs["prompt_embeds"].with_rows(rows), generator=generator)
        mask = torch.ones(embeds.shape[:2])
        mask[:, embeds.shape[1] - embeds.shape[1] // 4 :] = 0
        pooled = specs.get(POOLED)
        return TextCondition(
            embeds, mask, None if pooled is None else torch.randn(pooled.with_rows(rows), generator=generator)
        )

    def random_image(
        self, workload: Workload, rows: int, generator: torch.Generator
    ) -> ImageCondition | None:
        """Random pictures of a model that needs one."""
        if not self.needed_images:
            return None
        specs = self.tensors(workload)
        channels, context = (
            torch.randn(specs[name].with_rows(rows), generator=generator) if name in specs else None
            for name in (CONDITION, IMAGE_EMBEDS)
        )
        return ImageCondition(channels, context)

    def trace_inputs(self, segment: Segment, workload: Workload, rows: int) -> list[Tensor]:
        """Random tensors to trace a segment with."""
        generator = torch.Generator().manual_seed(0)
        return [spec.random(rows, generator) for spec in self.inputs(segment, workload)]


def vae_videos(vae: Any, latents: Tensor, *conditions: Tensor) -> Iterator[Tensor]:
    """The VAE's videos of latents (videos, channels, frames, rows, columns), with a row of each condition.

    One at a time: no video reads another, and the memory of decoding several is that of one.
    """
    for row in zip(*(tensor.split(1) for tensor in (latents, *conditions)), strict=True):
        yield vae.decode(*row, return_dict=False)[0]


def load_class(name: str) -> Any:
    """A diffusers class by name, imported when needed."""
    import diffusers

    return getattr(diffusers, name)
