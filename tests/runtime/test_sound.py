"""LTX-2 from prompts and pictures to frames and sound, as diffusers' pipelines on whole tiny checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import LTX2ImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from stg_trt import VideoPipeline, build
from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.workload import Workload
from stg_trt.runtime.components import Components
from tests.conftest import BuiltOnce
from tests.support.cli import invoke
from tests.support.compared_calls import noisy_picture
from tests.support.tiny_ltx2 import (
    AUDIO_CHANNELS,
    CHANNELS,
    REGISTERS,
    TEXT_WIDTH,
    VERSIONS,
    diffusers_pipeline,
    save_ltx2,
    tiny_gemma,
)

TEXT_LENGTH = 2 * REGISTERS
# Those of the goldens, so that the engines share the graphs of their blocks.
SIZES: dict[str, Any] = {"height": 128, "width": 160, "num_frames": 17}
FRAME_TOKENS, SOUND_TOKENS = 4 * 5, 18
TOKENS = 3 * FRAME_TOKENS
# Of the sound, a hundred per second.
SPECTRA = 4 * SOUND_TOKENS - 3
PROMPTS = ["a red circle moving left", " a blue square\n"]
RATES = {"2.0": 24_000, "2.3": 48_000}
CPU = torch.device("cpu")
Folder = Callable[[str], Path]
Open = Callable[[str], VideoPipeline]

pytestmark = pytest.mark.slow(reason="builds the engines of LTX-2")


@pytest.fixture(scope="module")
def checkpoint(built_once: BuiltOnce) -> Folder:
    return lambda version: built_once(f"ltx-{version}", lambda folder: save_ltx2(folder, version))


@pytest.fixture(scope="module")
def opened(checkpoint: Folder, built_once: BuiltOnce) -> Open:
    def fill(version: str, engines: Path) -> None:
        sizes = {**SIZES, "text_length": TEXT_LENGTH, "max_batch": 2, "verify_timesteps": 1}
        build(checkpoint(version), engines, **sizes, stg_blocks=[1])

    @cache
    def pipeline(version: str) -> VideoPipeline:
        engines = built_once(f"ltx-{version}-engines", lambda folder: fill(version, folder))
        return VideoPipeline.from_pretrained(checkpoint(version), engines)

    return pipeline


of_diffusers = cache(diffusers_pipeline)


def call(**changes: Any) -> dict[str, Any]:
    """Arguments that both take: all four passes, other scales for the sound."""
    return {
        **SIZES,
        "prompt": PROMPTS,
        "negative_prompt": ["blurred"] * 2,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "stg_scale": 1.0,
        "modality_scale": 2.0,
        "guidance_rescale": 0.7,
        "audio_guidance_scale": 5.0,
        "audio_stg_scale": 0.5,
        "audio_modality_scale": 3.0,
        "audio_guidance_rescale": 0.3,
        "spatio_temporal_guidance_blocks": [1],
        "max_sequence_length": TEXT_LENGTH,
        "generator": torch.Generator().manual_seed(7),
        "output_type": "np",
        **changes,
    }


def picture(seed: int = 0) -> Image.Image:
    """Of another size and shape than the video."""
    return noisy_picture(90, 110, seed)


def animated(**changes: Any) -> dict[str, Any]:
    """A call with a picture, of one video."""
    return call(**{"image": picture(), "prompt": PROMPTS[0], "negative_prompt": "blurred"} | changes)


@contextmanager
def as_lightricks(transformer: Any) -> Iterator[None]:
    """Makes diffusers' model treat clean tokens as Lightricks' code does, which trained it.

    The video's attention to the sound is shifted and scaled by each token's own timestep, and the clean
    latents that the prediction of a clean token means are the latents that it has.
    """
    timesteps: list[Tensor] = []

    def keep(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        timesteps[:] = [options["timestep"]]

    def per_token(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return timesteps[0].flatten(), *arguments[1:]

    def still(module: Any, arguments: Any, preds: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.where(timesteps[0][:, :, None] == 0, 0.0, preds[0]), preds[1]

    hooks = (
        transformer.register_forward_pre_hook(keep, with_kwargs=True),
        transformer.av_cross_attn_video_scale_shift.register_forward_pre_hook(per_token),
        transformer.register_forward_hook(still),
    )
    yield
    for hook in hooks:
        hook.remove()


def noise(videos: int = 2) -> dict[str, Any]:
    """Of both streams, packed."""
    generator = torch.Generator().manual_seed(3)
    return {
        "latents": torch.randn(videos, TOKENS, CHANNELS, generator=generator),
        "audio_latents": torch.randn(videos, SOUND_TOKENS, AUDIO_CHANNELS, generator=generator),
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_prompts_make_the_frames_and_the_sound_of_diffusers(
    checkpoint: Folder, opened: Open, version: str
) -> None:
    expected, got = of_diffusers(checkpoint(version))(**call()), opened(version)(**call())
    assert np.abs(got.frames - expected.frames).max() <= 1e-4 and got.frames.std() > 1e-2
    assert got.audio is not None and got.audio.dtype == torch.float32
    assert got.audio.shape == expected.audio.shape == (2, 2, RATES[version] * SPECTRA // 100)
    assert (got.audio - expected.audio).abs().max() <= 1e-4 and got.audio.std(-1).min() > 1e-2
    assert got.audio_sampling_rate == RATES[version]


def test_sigmas_are_those_of_diffusers(checkpoint: Folder, opened: Open) -> None:
    """The scheduler's shift by the number of tokens moves them."""
    given = call(sigmas=[1.0, 0.9, 0.6, 0.2], num_inference_steps=4)
    expected = of_diffusers(checkpoint("2.3"))(**given)
    got = opened("2.3")(**given | {"generator": torch.Generator().manual_seed(7)})
    assert np.abs(got.frames - expected.frames).max() <= 1e-4
    assert got.audio is not None and (got.audio - expected.audio).abs().max() <= 1e-4
    usual = opened("2.3")(**call(num_inference_steps=4))
    assert np.abs(got.frames - usual.frames).max() > 1e-3


@pytest.mark.parametrize("version", VERSIONS)
def test_two_prompts_at_once_are_each_alone(opened: Open, version: str) -> None:
    pipeline, start = opened(version), noise()
    both = pipeline(**call(**start))
    assert both.audio is not None
    for row, prompt in enumerate(PROMPTS):
        alone = {name: tensor[row : row + 1] for name, tensor in start.items()}
        one = pipeline(**call(prompt=prompt, negative_prompt="blurred", **alone))
        assert one.audio is not None
        assert np.abs(one.frames[0] - both.frames[row]).max() <= 1e-4
        assert (one.audio[0] - both.audio[row]).abs().max() <= 1e-4


@pytest.mark.parametrize("version", VERSIONS)
def test_embeddings_of_a_call_are_those_before_the_connectors(
    checkpoint: Folder, opened: Open, version: str
) -> None:
    """Given without their padding, two videos of one prompt."""
    own = of_diffusers(checkpoint(version))
    given: dict[str, Any] = {}
    with torch.no_grad():
        for prefix, prompt in (("", PROMPTS[0]), ("negative_", "blurred")):
            embeds, mask = own._get_gemma_prompt_embeds(prompt, max_sequence_length=TEXT_LENGTH)
            real = int(mask.sum())
            given |= {
                f"{prefix}prompt_embeds": embeds[:, -real:],
                f"{prefix}prompt_attention_mask": mask[:, -real:],
            }
    shared = call(num_videos_per_prompt=2, output_type="latent")
    texts = {"prompt": PROMPTS[0], "negative_prompt": "blurred"}
    expected = opened(version)(**{**shared, **noise(), **texts})
    got = opened(version)(**{**shared, **noise(), **dict.fromkeys(texts), **given})
    assert (got.frames - expected.frames).abs().max() <= 1e-5
    assert got.audio is not None and expected.audio is not None
    assert (got.audio - expected.audio).abs().max() <= 1e-5
    assert got.audio.shape == (2, SOUND_TOKENS, AUDIO_CHANNELS) and got.audio_sampling_rate is None


@pytest.mark.parametrize(
    ("part", "output_type", "message"),
    [
        ("connectors", "latent", "connectors/, which makes the transformer's of the embeddings, got none in"),
        ("audio_vae", "np", "audio_vae/, which decodes the sound, got none in"),
        ("vocoder", "np", "vocoder/, which decodes the sound, got none in"),
    ],
)
def test_a_missing_part_is_refused_before_the_sampling(
    checkpoint: Folder, opened: Open, tmp_path: Path, part: str, output_type: str, message: str
) -> None:
    folder = Path(shutil.copytree(checkpoint("2.3"), tmp_path / "model"))
    shutil.rmtree(folder / part)
    pipeline = VideoPipeline.from_pretrained(folder, opened("2.3").store.root)
    with pytest.raises(InvalidRequest) as refused:
        pipeline(**call(output_type=output_type))
    assert str(refused.value) == f"checkpoint: expected {message} model: give the whole checkpoint"
    assert not pipeline._samplers._samplers
    output = tmp_path / ("x.mp4" if output_type == "np" else "x.safetensors")
    options = ("--engines", opened("2.3").store.root, "--output", output, "--prompt", PROMPTS[0])
    result = invoke("generate", folder, *options)
    assert result.returncode == 1 and result.stderr == f"stg-trt: {refused.value}\n"
    if output_type == "np":  # Latents need no decoder.
        assert pipeline(**call(output_type="latent")).audio is not None


def test_a_text_encoder_of_another_model_is_refused(checkpoint: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("2.0"), tmp_path / "model"))
    shutil.rmtree(folder / "text_encoder")
    tiny_gemma(61, layers=3).save_pretrained(folder / "text_encoder")
    components = Components(Checkpoint.open(folder), dtype=None, offload=False)
    with pytest.raises(
        InvalidRequest, match=rf"text_encoder/ with embeddings of width {3 * TEXT_WIDTH}, .*, got 64: the"
    ):
        components.load_text(Workload(**SIZES, text_length=TEXT_LENGTH, audio_num_frames=SOUND_TOKENS), CPU)


def test_parts_have_their_dtypes_on_a_gpu(checkpoint: Folder) -> None:
    """Loading moves nothing, so that this needs no GPU. The vocoder's long sums need float32."""
    components = Components(Checkpoint.open(checkpoint("2.3")), dtype=None, offload=False)
    workload = Workload(**SIZES, text_length=TEXT_LENGTH, audio_num_frames=SOUND_TOKENS)
    parts = components.load_decoders(workload, torch.device("cuda"))
    dtypes = [part.dtype for part in (parts.vae, parts.audio_vae, parts.vocoder)]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_parts_come_and_go(checkpoint: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """With offload, each is moved to the device for its work, and back."""
    components = Components(Checkpoint.open(checkpoint("2.0")), dtype=None, offload=True)
    workload = Workload(**SIZES, text_length=TEXT_LENGTH, audio_num_frames=SOUND_TOKENS)
    moved: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda part, place: moved.append(type(part).__name__))
    components.connect(components.encode(PROMPTS, workload, CPU), CPU)
    waveforms, rate = components.decode_sound(noise()["audio_latents"], workload, CPU)
    assert moved == [
        *["Gemma3ForConditionalGeneration"] * 2,
        *["LTX2TextConnectors"] * 2,
        *["AutoencoderKLLTX2Audio", "LTX2Vocoder"] * 2,
    ]
    assert waveforms.shape == (2, 2, RATES["2.0"] * SPECTRA // 100) and rate == RATES["2.0"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_command_line_writes_frames_with_sound(
    checkpoint: Folder, opened: Open, tmp_path: Path, version: str
) -> None:
    made = opened(version)(
        prompt=PROMPTS[0], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
    )
    options = ("--engines", opened(version).store.root, "--prompt", PROMPTS[0], "--num-inference-steps=2")
    output = tmp_path / "x.mp4"
    result = invoke("generate", checkpoint(version), *options, "--output", output)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{output}\n" and made.audio is not None
    with av.open(output) as container:
        (video,), (sound,) = container.streams.video, container.streams.audio
        assert video.frames == SIZES["num_frames"] and video.average_rate == 24
        assert (sound.sample_rate, sound.channels) == (RATES[version], 2)
        read = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    assert 0 <= read.shape[1] - made.audio.shape[2] < 2048
    played, expected = read[:, : made.audio.shape[2]], made.audio[0].numpy()
    # The codec keeps most of a sound that is much like noise, and keeps it in its place.
    alike = [np.corrcoef(played.flatten(), other.flatten())[0, 1] for other in (expected, expected[:, ::-1])]
    assert alike[0] > 0.7 and abs(alike[1]) < 0.3


def test_the_command_line_takes_and_writes_the_latents_of_both_streams(
    checkpoint: Folder, opened: Open, tmp_path: Path
) -> None:
    start = {name: tensor[:1] for name, tensor in noise().items()}
    save_file({name: tensor.contiguous() for name, tensor in start.items()}, tmp_path / "noise.safetensors")
    made = opened("2.3")(prompt=PROMPTS[0], num_inference_steps=2, output_type="latent", **start)
    options = ("--engines", opened("2.3").store.root, "--prompt", PROMPTS[0], "--num-inference-steps=2")
    files = ("--embeds", tmp_path / "noise.safetensors", "--output", tmp_path / "x.safetensors")
    result = invoke("generate", checkpoint("2.3"), *options, *files)
    assert result.returncode == 0, result.stderr
    written = load_file(tmp_path / "x.safetensors")
    assert made.audio is not None
    assert (written["latents"] - made.frames).abs().max() <= 1e-5
    assert (written["audio_latents"] - made.audio).abs().max() <= 1e-5


@pytest.mark.parametrize("version", VERSIONS)
def test_a_picture_is_the_first_frame(checkpoint: Folder, opened: Open, version: str) -> None:
    """From a file to frames and sound, by all four passes, as diffusers with Lightricks' clean tokens."""
    own = LTX2ImageToVideoPipeline.from_pipe(of_diffusers(checkpoint(version)))
    with as_lightricks(own.transformer):
        expected = own(**animated())
    got = opened(version)(**animated())
    assert np.abs(got.frames - expected.frames).max() <= 1e-4 and got.frames.std() > 1e-2
    assert got.audio is not None and (got.audio - expected.audio).abs().max() <= 1e-4
    without = opened(version)(**animated(image=None))
    assert np.abs(got.frames - without.frames).max() > 1e-2


def test_the_picture_is_compressed_as_the_models_frames_were(checkpoint: Folder, opened: Open) -> None:
    own = LTX2ImageToVideoPipeline.from_pipe(of_diffusers(checkpoint("2.0")))
    kept = animated(image_crf=0, num_inference_steps=2)
    with as_lightricks(own.transformer):
        expected = own(**kept).frames
    got = opened("2.0")(**kept | {"generator": torch.Generator().manual_seed(7)}).frames
    assert np.abs(got - expected).max() <= 1e-4
    first = [
        opened("2.0")(**animated(image_crf=crf, num_inference_steps=2, output_type="latent")).frames[
            :, :FRAME_TOKENS
        ]
        for crf in (0, 33, None)
    ]
    assert torch.equal(first[1], first[2]) and (first[0] - first[1]).abs().max() > 1e-2


def test_latents_that_are_given_hold_the_first_frame(opened: Open) -> None:
    """Whatever the picture; noise is mixed into the other frames and the sound, as in diffusers."""
    start, options = noise(1), {"output_type": "latent", "audio_guidance_rescale": 0.0}
    seeded = torch.Generator().manual_seed(7)
    drawn = {name: torch.randn(tensor.shape, generator=seeded) for name, tensor in start.items()}
    mixed = {name: torch.lerp(start[name], drawn[name], 0.5) for name in start}
    mixed["latents"][:, :FRAME_TOKENS] = start["latents"][:, :FRAME_TOKENS]
    expected = opened("2.3")(**animated(**mixed, **options))
    got = opened("2.3")(**animated(**start, **options, noise_scale=0.5))
    assert torch.equal(got.frames[:, :FRAME_TOKENS], start["latents"][:, :FRAME_TOKENS])
    assert (got.frames - expected.frames).abs().max() <= 1e-5
    assert got.audio is not None and expected.audio is not None
    assert (got.audio - expected.audio).abs().max() <= 1e-5


def test_two_pictures_are_each_alone(opened: Open) -> None:
    pictures = [picture(i) for i in range(2)]
    pipeline, options = opened("2.3"), {"output_type": "latent", "negative_prompt": "blurred"}
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    both = pipeline(**call(image=pictures, **options, generator=generators))
    for row, generator in enumerate(torch.Generator().manual_seed(i) for i in range(2)):
        one = {"image": pictures[row], "prompt": PROMPTS[row], "generator": generator}
        alone = pipeline(**call(**one, **options))
        assert (alone.frames[0] - both.frames[row]).abs().max() <= 1e-5
        assert alone.audio is not None and both.audio is not None
        assert (alone.audio[0] - both.audio[row]).abs().max() <= 1e-5
    assert (both.frames[0] - both.frames[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_crf": 52}, "image_crf: expected a whole number from 0 to 51, got 52: use 33, or 0 to keep"),
        ({"image_crf": 1.5}, "image_crf: expected a whole number from 0 to 51, got 1.5: use 33"),
        ({"image": None, "image_crf": 20}, "image_crf: expected it beside image, got it without: add the"),
        (
            {"image": np.zeros((64, 96, 3), np.float32)},
            "image: expected a path, a PIL image or an array of uint8, which H.264 compresses as the model",
        ),
        ({"conditions": [{"image": picture()}]}, "conditions: expected none for this ltx-2 checkpoint"),
        ({"last_image": picture()}, "last_image: expected none, for which this ltx-2 checkpoint was not"),
        ({"strength": 0.5}, "arguments: expected those of VideoPipeline, got strength"),
    ],
)
def test_pictures_that_it_does_not_take(opened: Open, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        opened("2.3")(**animated(**changes))
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_the_command_line_takes_a_picture(checkpoint: Folder, opened: Open, tmp_path: Path) -> None:
    picture().save(tmp_path / "start.png")
    made = opened("2.0")(
        prompt=PROMPTS[0], image=tmp_path / "start.png", num_inference_steps=2,
        generator=torch.Generator().manual_seed(0), output_type="latent",
    )  # fmt: skip
    options = ("--engines", opened("2.0").store.root, "--prompt", PROMPTS[0], "--num-inference-steps=2")
    files = ("--image", tmp_path / "start.png", "--output", tmp_path / "x.safetensors")
    result = invoke("generate", checkpoint("2.0"), *options, *files)
    assert result.returncode == 0, result.stderr
    assert (load_file(tmp_path / "x.safetensors")["latents"] - made.frames).abs().max() <= 1e-5
