"""The moving-shapes example: its generator, its image analysis and its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, LTXImageToVideoPipeline, LTXPipeline

from examples.moving_shapes import clips, evaluate, linear_start, measure, models, settings, train
from examples.moving_shapes.demo import CHECKPOINT

MAX_BYTES = 15_000_000
PROMPTS = (
    clips.Label("plain", "red", "circle", "left"),
    clips.Label("striped", "green", "square", "down"),
    clips.Label("striped", "blue", "triangle", "right"),
    clips.Label("plain", "yellow", "circle", "up"),
)


@pytest.fixture(scope="module")
def pipe() -> models.ShapesPipeline:
    """The checkpoint, ready to sample clips of the size it was trained on."""
    loaded: models.ShapesPipeline = models.ShapesPipeline.from_pretrained(CHECKPOINT)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def sample(
    pipe: LTXPipeline, labels: Sequence[clips.Label], steps: int, cfg_scale: float, size: int = clips.SIZE
) -> clips.Array:
    """Clips for some labels, from a fixed seed."""
    frames: clips.Array = pipe(
        prompt=[label.prompt for label in labels],
        negative_prompt="",
        height=size,
        width=size,
        num_frames=clips.NUM_FRAMES,
        frame_rate=clips.FRAME_RATE,
        num_inference_steps=steps,
        guidance_scale=cfg_scale,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=16,
        output_type="np",
    ).frames
    return frames


def test_labels_cover_every_combination() -> None:
    assert len(clips.COLOURS) >= 4
    assert len(clips.SHAPES) >= 3
    assert len(clips.DIRECTIONS) >= 4
    assert len(clips.TEXTURES) >= 2
    assert len({label.prompt for label in clips.LABELS}) == 96
    assert PROMPTS[0].prompt == "a plain red circle moving left"


def test_generator_is_seeded() -> None:
    first, again, other = (list(islice(clips.clips(seed), 6)) for seed in (3, 3, 4))
    assert [label for label, _ in first] == [label for label, _ in again]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for (_, a), (_, b) in zip(first, other, strict=True))


def test_each_round_holds_every_label_once() -> None:
    assert {label for label, _ in islice(clips.clips(0), 96)} == set(clips.LABELS)


@pytest.mark.slow(reason="draws and measures 72 clips")
def test_measure_reads_the_generators_clips() -> None:
    for label, clip in islice(clips.clips(11), 72):
        found = measure.measure(clip)
        assert found.matches(label)["all"], (label, found)
        assert found.overlap > 0.8
        assert found.jitter < 0.3


def test_measure_calls_an_empty_or_still_clip_unclear() -> None:
    empty = np.full((clips.NUM_FRAMES, clips.SIZE, clips.SIZE, 3), clips.BACKGROUND, dtype=np.float32)
    assert measure.measure(empty).colour == measure.UNCLEAR
    _, moving = next(clips.clips(0))
    still = np.repeat(moving[:1], clips.NUM_FRAMES, axis=0)
    assert measure.measure(still).direction == measure.UNCLEAR


def test_measure_calls_two_shapes_at_once_unclear() -> None:
    corners = [clips.shape_mask("plain", "circle", x, x, 5.0) for x in (8.0, 60.0)]
    mask = np.maximum(*corners)[None, ..., None].repeat(clips.NUM_FRAMES, axis=0)
    clip = mask * np.array(clips.COLOURS["red"], np.float32) + (1 - mask) * clips.BACKGROUND
    assert measure.measure(clip.astype(np.float32)).shape == measure.UNCLEAR


def test_a_shape_in_a_picture_can_move_in_any_direction() -> None:
    """So a picture does not tell the direction: no move takes its shape out of it."""
    labels = [clips.Label("plain", "red", shape, "left") for shape in clips.SHAPES]
    made = [clips.make_picture(label, np.random.default_rng(seed)) for label in labels for seed in range(9)]
    drawn = np.stack(made).max(axis=-1) > clips.BACKGROUND + 0.01
    away = (clips.NUM_FRAMES - 1) * clips.SPEED
    edge = np.ones((clips.SIZE, clips.SIZE), dtype=bool)
    edge[away:-away, away:-away] = False
    assert drawn.any(axis=(1, 2)).all()
    assert not drawn[:, edge].any()


def test_pictures_of_a_case_do_not_depend_on_the_direction(pipe: LTXPipeline) -> None:
    labels = [clips.Label("striped", "blue", "square", direction) for direction in clips.DIRECTIONS]
    cases = [evaluate.Case(label, 5) for label in labels]
    pictures = evaluate.make_pictures(cases, pipe.vae)
    assert all(np.array_equal(one.given, pictures[0].given) for one in pictures)
    assert evaluate.first_frame_errors([picture.decoded[None] for picture in pictures], pictures) == [0.0] * 4


def test_the_difference_is_in_levels_of_a_byte() -> None:
    black = np.zeros((2, 2, 3), np.float32)
    assert measure.difference(black, black + np.float32(1)) == 255
    assert measure.difference(black, black + np.array([0, 0, 0.5], np.float32)) == pytest.approx(42.5)


def test_padding_changes_nothing_in_an_untrained_text_encoder() -> None:
    tokenizer = models.make_tokenizer()
    encoder = models.make_text_encoder(len(tokenizer))
    assert_padding_is_hidden(tokenizer, encoder)


def test_checkpoint_is_small() -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} <= {".json", ".safetensors"}
    assert not [path for path in files if path.suffix == ".json" and "_name_or_path" in path.read_text()]


def test_checkpoint_has_the_real_classes(pipe: LTXPipeline) -> None:
    config = pipe.transformer.config
    assert type(pipe.transformer).__name__ == "LTXVideoTransformer3DModel"
    assert type(pipe.vae).__name__ == "AutoencoderKLLTXVideo"
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert config.num_layers >= 8
    assert config.attention_head_dim == 64
    assert 2e6 <= sum(param.numel() for param in pipe.transformer.parameters()) <= 4e6


def test_padding_changes_nothing_in_the_checkpoint(pipe: LTXPipeline) -> None:
    assert_padding_is_hidden(pipe.tokenizer, pipe.text_encoder)


def test_a_picture_is_encoded_without_noise_after_training(pipe: LTXPipeline) -> None:
    assert_samples_are_the_mean(pipe.vae)


@pytest.mark.slow(reason="computes an encoder by least squares")
def test_a_picture_is_encoded_without_noise_before_training() -> None:
    vae = models.make_vae()
    video = train.next_video(clips.clips(0), linear_start.BATCH)
    with torch.no_grad():
        linear_start.compute_encoder(vae.encoder, video, torch.zeros(len(video), 64, 5, 6, 6))
    assert_samples_are_the_mean(vae)


@pytest.mark.slow(reason="runs the example's model in diffusers")
def test_the_linear_code_is_what_the_encoder_computes(pipe: LTXPipeline) -> None:
    source = clips.clips(1)
    code = linear_start.linear_code(pipe.vae, train.next_video(source, train.CODE_CLIPS))
    video = train.next_video(source, 6)
    with torch.no_grad():
        encoded = pipe.vae.encode(video).latent_dist.mode()
    assert (code.encode(video) - encoded).norm() < 0.005 * encoded.norm()


def test_a_fitted_convolution_computes_what_it_is_fitted_to() -> None:
    """With inputs that are always zero, and with the padding of the decoder."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 6, 6, generator=generator)
    x[:, 1] = 0
    convolution = models.make_vae().decoder.conv_in
    convolution.conv = torch.nn.Conv3d(3, 2, 3, padding=(0, 1, 1))
    with torch.no_grad():
        wanted = linear_start.rows_of(convolution(x))
        inputs = linear_start.neighbourhoods(x, torch.ones(len(wanted), dtype=torch.bool))
        weight, bias = linear_start.least_squares([(inputs, wanted)])
    assert torch.allclose(inputs @ weight.T + bias, wanted, atol=1e-3)
    assert weight.abs().max() < 2


def test_clips_begin_with_the_pictures_that_are_given() -> None:
    given: list[dict[str, Any]] = []
    pictures = [clips.make_picture(PROMPTS[0], np.random.default_rng(seed)) for seed in (0, 1)]

    def pipeline(**options: Any) -> SimpleNamespace:
        given.append(options)
        return SimpleNamespace(frames=None)

    for chosen in ([], pictures):
        settings.sample(pipeline, settings.Setting(), ["a", "b"], [0, 1], 2, chosen)  # type: ignore[arg-type]
    without, with_pictures = (options["image"] for options in given)
    assert without is None
    for image, picture in zip(with_pictures, pictures, strict=True):
        assert np.abs(np.asarray(image) / 255 - picture).max() <= 0.5 / 255 + 1e-6


@pytest.mark.slow(reason="runs the example's model in diffusers")
def test_diffusers_own_pipeline_animates_a_picture() -> None:
    own = LTXImageToVideoPipeline.from_pretrained(CHECKPOINT)
    own.set_progress_bar_config(disable=True)
    wide = np.full((96, 96, 3), clips.BACKGROUND, dtype=np.float32)
    wide[12:84, 12:84] = clips.make_picture(PROMPTS[0], np.random.default_rng(0))
    image = settings.as_image(wide)
    frames = own(
        image=image,
        prompt=PROMPTS[0].prompt,
        height=96,
        width=96,
        num_frames=clips.NUM_FRAMES,
        frame_rate=clips.FRAME_RATE,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=16,
        output_type="np",
    ).frames
    decoded = evaluate.encode_and_decode(settings.as_array(image), own.vae)
    assert measure.difference(frames[0, 0], decoded) <= 2


@pytest.mark.slow(reason="runs the example's model in diffusers")
def test_vae_keeps_the_clips(pipe: LTXPipeline) -> None:
    for label, clip in islice(clips.clips(12), 24):
        video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None] * 2 - 1
        with torch.no_grad():
            decoded = pipe.vae.decode(pipe.vae.encode(video).latent_dist.mode(), return_dict=False)[0]
        kept = (decoded[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1).numpy()
        assert measure.measure(kept).matches(label)["all"]


@pytest.mark.slow(reason="runs the example's model in diffusers")
def test_diffusers_own_pipeline_loads_and_samples() -> None:
    own = LTXPipeline.from_pretrained(CHECKPOINT)
    own.set_progress_bar_config(disable=True)
    video = sample(own, PROMPTS[:1], steps=4, cfg_scale=3.0, size=96)
    assert video.shape == (1, clips.NUM_FRAMES, 96, 96, 3)
    assert measure.find_colour(video[0]) == PROMPTS[0].colour


def test_sampling_is_reproducible(pipe: LTXPipeline) -> None:
    first, again = (sample(pipe, PROMPTS[:1], steps=2, cfg_scale=1.0) for _ in range(2))
    assert first.shape == (1, clips.NUM_FRAMES, clips.SIZE, clips.SIZE, 3)
    assert np.array_equal(first, again)


@pytest.mark.slow(reason="runs the example's model in diffusers")
def test_samples_show_what_the_prompts_say(pipe: LTXPipeline) -> None:
    """Eight in ten on the whole, over prompts that mix all textures, colours and shapes; see the README."""
    labels = [case.label for case in evaluate.make_cases(12)]
    found = [measure.measure(clip) for clip in sample(pipe, labels, steps=20, cfg_scale=3.0)]
    right = [
        (one.texture, one.colour, one.shape) == (label.texture, label.colour, label.shape)
        for one, label in zip(found, labels, strict=True)
    ]
    assert sum(right) >= 8


def assert_padding_is_hidden(tokenizer: object, encoder: torch.nn.Module) -> None:
    """The words' embeddings are the same at any padded length."""
    for prompt in ("", PROMPTS[0].prompt):
        short, long = (
            tokenizer([prompt], padding="max_length", max_length=length, return_tensors="pt")  # type: ignore[operator]
            for length in (16, 128)
        )
        words = int(short.attention_mask.sum())
        with torch.no_grad():
            few, many = (encoder(text.input_ids)[0][:, :words] for text in (short, long))
        assert torch.allclose(few, many, atol=1e-5)


def assert_samples_are_the_mean(vae: AutoencoderKLLTXVideo) -> None:
    """diffusers' image-to-video pipelines sample the posterior of a picture."""
    picture = clips.make_picture(PROMPTS[0], np.random.default_rng(0))
    video = torch.from_numpy(picture).permute(2, 0, 1)[None, :, None] * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(video).latent_dist
    assert torch.allclose(posterior.sample(), posterior.mode(), atol=1e-5)
