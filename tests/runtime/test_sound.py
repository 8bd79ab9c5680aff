"""LTX-2 from prompts to frames and sound, as diffusers' LTX2Pipeline on whole tiny checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import LTX2Pipeline
from safetensors.torch import load_file, save_file

from stg_trt import VideoPipeline, build
from stg_trt.errors import InvalidRequest
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.models.workload import Workload
from stg_trt.runtime.components import Components
from tests.conftest import BuiltOnce
from tests.support.cli import invoke
from tests.support.tiny_ltx2 import (
    AUDIO_CHANNELS,
    CHANNELS,
    REGISTERS,
    TEXT_WIDTH,
    VERSIONS,
    save_ltx2,
    tiny_gemma,
)

TEXT_LENGTH = 2 * REGISTERS
SIZES: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9}
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


@cache
def of_diffusers(folder: Path) -> LTX2Pipeline:
    pipeline = LTX2Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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


def noise(videos: int = 2) -> dict[str, Any]:
    """Of both streams, packed."""
    generator = torch.Generator().manual_seed(3)
    return {
        "latents": torch.randn(videos, 12, CHANNELS, generator=generator),
        "audio_latents": torch.randn(videos, 9, AUDIO_CHANNELS, generator=generator),
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_prompts_make_the_frames_and_the_sound_of_diffusers(
    checkpoint: Folder, opened: Open, version: str
) -> None:
    expected, got = of_diffusers(checkpoint(version))(**call()), opened(version)(**call())
    assert np.abs(got.frames - expected.frames).max() <= 1e-4 and got.frames.std() > 1e-2
    assert got.audio is not None and got.audio.dtype == torch.float32
    assert got.audio.shape == expected.audio.shape == (2, 2, RATES[version] * 33 // 100)
    assert (got.audio - expected.audio).abs().max() <= 1e-4 and got.audio.std(-1).min() > 1e-2
    assert got.audio_sampling_rate == RATES[version]


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
    assert got.audio.shape == (2, 9, AUDIO_CHANNELS) and got.audio_sampling_rate is None


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
    assert not pipeline._samplers
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
        components.load_text(Workload(**SIZES, text_length=TEXT_LENGTH, audio_num_frames=9), CPU)


def test_parts_have_their_dtypes_on_a_gpu(checkpoint: Folder) -> None:
    """Loading moves nothing, so that this needs no GPU. The vocoder's long sums need float32."""
    components = Components(Checkpoint.open(checkpoint("2.3")), dtype=None, offload=False)
    workload = Workload(**SIZES, text_length=TEXT_LENGTH, audio_num_frames=9)
    parts = components.load_decoders(workload, torch.device("cuda"))
    dtypes = [part.dtype for part in (parts.vae, parts.audio_vae, parts.vocoder)]
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_parts_come_and_go(checkpoint: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """With offload, each is moved to the device for its work, and back."""
    components = Components(Checkpoint.open(checkpoint("2.0")), dtype=None, offload=True)
    workload = Workload(**SIZES, text_length=TEXT_LENGTH, audio_num_frames=9)
    moved: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda part, place: moved.append(type(part).__name__))
    components.connect(components.encode(PROMPTS, workload, CPU), CPU)
    waveforms, rate = components.decode_sound(noise()["audio_latents"], workload, CPU)
    assert moved == [
        *["Gemma3ForConditionalGeneration"] * 2,
        *["LTX2TextConnectors"] * 2,
        *["AutoencoderKLLTX2Audio", "LTX2Vocoder"] * 2,
    ]
    assert waveforms.shape == (2, 2, 7920) and rate == RATES["2.0"]


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
        assert video.frames == 9 and video.average_rate == 24
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
