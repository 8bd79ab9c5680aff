"""Latents to frames against diffusers' own pipelines: in tiles, one video at a time, with noise."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import av
import numpy as np
import pytest
import torch

from stg_trt import VideoPipeline
from stg_trt.errors import InvalidRequest, OutOfDeviceMemory
from stg_trt.models.checkpoint import Checkpoint
from stg_trt.runtime.components import channels_last
from stg_trt.runtime.output import VideoPipelineOutput
from stg_trt.runtime.video_file import save_video
from tests.support.cli import invoke
from tests.support.family_cases import CASES, HUNYUAN_VIDEO, LTX, FamilyCase
from tests.support.whole_pipelines import NEGATIVE, PROMPTS, call, of_diffusers, seeded, shrink_tiles

CPU = torch.device("cpu")
TILED_BY_CONFIGURATION = [case for case in CASES if not case.vae_tiles]


def reopened(case: FamilyCase, pipeline: VideoPipeline, *, vae_tiling: bool) -> VideoPipeline:
    """Another pipeline over the same engines, whose VAE has small tiles, whether or not they are used."""
    opened = VideoPipeline(pipeline.checkpoint, pipeline.store, vae_tiling=vae_tiling)
    opened.scheduler = case.schedulers[0]
    shrink_tiles(opened.components.load_vae(case.workload, CPU).vae, case.vae_tiles)
    return opened


def read_video(path: Path) -> Any:
    """Frames in 0..255."""
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(
            float
        )


def test_tiles_are_those_of_diffusers(case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline) -> None:
    given = call(case, pipeline, PROMPTS) | {"num_inference_steps": 2}
    noise = [[seeded(1), seeded(2)] for _ in range(3)]
    expected = of_diffusers(
        case, checkpoint, case.schedulers[0], "np", **given, tiles=case.vae_tiles, generator=noise[0]
    )
    given |= {"stg_scale": 0.0, "rescale": 0.0, "output_type": "np"}
    tiled, whole = (
        reopened(case, pipeline, vae_tiling=on)(**given, generator=drawn).frames
        for on, drawn in zip((True, False), noise[1:], strict=True)
    )
    assert tiled.shape == expected.shape and np.abs(tiled - expected).max() <= 1e-4
    assert np.abs(tiled - whole).max() > 1e-2


@pytest.mark.parametrize("case", [LTX, HUNYUAN_VIDEO], ids=str, indirect=True)
def test_weights_with_their_channels_last_decode_the_same(case: FamilyCase, pipeline: VideoPipeline) -> None:
    """As they are on a GPU."""
    opened = reopened(case, pipeline, vae_tiling=False)
    given = {**call(case, pipeline, PROMPTS[:1]), "num_inference_steps": 1, "output_type": "pt"}
    expected = opened(**given, generator=seeded(1)).frames
    vae = opened.components.decoder.vae
    channels_last(vae)
    weights = [weight for weight in vae.parameters() if weight.ndim == 5]
    assert weights and all(one.is_contiguous(memory_format=torch.channels_last_3d) for one in weights)
    assert (opened(**given, generator=seeded(1)).frames - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("vae_tiling", [False, True])
def test_videos_are_decoded_one_at_a_time(
    case: FamilyCase, pipeline: VideoPipeline, vae_tiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = reopened(case, pipeline, vae_tiling=vae_tiling).components
    vae = components.load_vae(case.workload, CPU).vae
    decode = Mock(side_effect=vae.decode)
    monkeypatch.setattr(vae, "decode", decode)
    latents = call(case, pipeline, PROMPTS)["latents"]
    with torch.no_grad():
        both, first, second = (
            components.decode(some, case.workload, CPU, "np") for some in (latents, latents[:1], latents[1:])
        )
    assert [len(call.args[0]) for call in decode.call_args_list] == [1] * 4
    assert np.abs(both[0] - both[1]).max() > 1e-2
    assert np.array_equal(both, np.concatenate([first, second]))


def test_each_video_is_shown_before_the_next_is_decoded(
    case: FamilyCase, pipeline: VideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.scheduler = case.schedulers[0]
    vae = pipeline.components.load_vae(case.workload, CPU).vae
    decode = Mock(side_effect=vae.decode)
    monkeypatch.setattr(vae, "decode", decode)
    shown = []

    def show(pipe: VideoPipeline, index: int, made: VideoPipelineOutput) -> None:
        assert pipe.num_videos == 2 and made.audio is None
        shown.append((index, len(decode.call_args_list), made.frames))

    given = {**call(case, pipeline, PROMPTS), "num_inference_steps": 2}
    for output_type in ("np", "pt", "pil"):
        made = pipeline(
            **given, generator=seeded(1), output_type=output_type, callback_on_video_end=show
        ).frames
        for row, (index, decoded, frames) in enumerate(shown):
            assert len(frames) == 1 and (index, decoded) == (row, row + 1)
            assert np.array_equal(np.stack(made[row]), np.stack(frames[0]))
        shown.clear()
        decode.reset_mock()


def test_latents_are_shown_to_nobody(case: FamilyCase, pipeline: VideoPipeline) -> None:
    pipeline.scheduler = case.schedulers[0]
    given = {**call(case, pipeline, PROMPTS), "output_type": "latent"}
    with pytest.raises(InvalidRequest, match=r"callback_on_video_end: .* \(pil, np, pt\), got 'latent'"):
        pipeline(**given, callback_on_video_end=Mock())


def test_noise_of_decoding_is_that_of_diffusers(
    case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline, tmp_path: Path
) -> None:
    if not case.decode_options:
        assert not pipeline.family.decode_options
        pytest.skip("its decoding takes no noise")
    assert case.decode_options.keys() == pipeline.family.decode_options - {"generator"}
    noisy = Path(shutil.copytree(checkpoint, tmp_path / "noisy"))
    plain = case.pipeline_class.from_pretrained(checkpoint).vae
    torch.manual_seed(0)
    type(plain).from_config(plain.config, **case.noisy_vae).save_pretrained(noisy / "vae")
    scheduler = case.schedulers[0]
    frames = []
    every: tuple[Mapping[str, Any], ...] = (case.decode_options, {})
    for options in every:
        for drawn in ([[seeded(1), seeded(2)] for _ in range(2)], [seeded(1), seeded(1)]):
            given = call(case, pipeline, PROMPTS) | {"num_inference_steps": 1, **options}
            expected = of_diffusers(case, noisy, scheduler, "np", **given, generator=drawn[0])
            opened = VideoPipeline(Checkpoint.open(noisy), pipeline.store)
            opened.scheduler = scheduler
            given |= {"stg_scale": 0.0, "rescale": 0.0, "output_type": "np"}
            frames.append(opened(**given, generator=drawn[1]).frames)
            assert np.abs(frames[-1] - expected).max() <= 1e-4
    for other in frames[1:3]:
        assert np.abs(frames[0] - other).max() > 1e-3


@pytest.mark.parametrize("case", TILED_BY_CONFIGURATION[:1], ids=str, indirect=True)
def test_the_command_line_decodes_in_tiles(
    case: FamilyCase, checkpoint: Path, pipeline: VideoPipeline, tmp_path: Path
) -> None:
    given = call(case, pipeline, PROMPTS[:1]) | {"latents": None, "num_inference_steps": 1}
    videos = []
    for on in (True, False):
        opened = VideoPipeline(pipeline.checkpoint, pipeline.store, vae_tiling=on)
        frames = opened(**given, generator=seeded(3), output_type="np").frames
        save_video(frames[0], tmp_path / "expected.mp4", opened.family.defaults.frame_rate)
        videos.append(read_video(tmp_path / "expected.mp4"))
    output = tmp_path / "x.mp4"
    options = ("--engines", pipeline.store.root, "--output", output, "--prompt", PROMPTS[0], "--seed=3")
    fixed = ("--negative-prompt", NEGATIVE, "--num-inference-steps=1", "--guidance-scale=4", "--vae-tiling")
    result = invoke("generate", checkpoint, *options, *fixed)
    assert result.returncode == 0, result.stderr
    # Rounding differs between processes, and what the codec makes of it.
    got = read_video(output)
    to_tiled, to_whole = (np.abs(got - video).mean() for video in videos)
    assert to_tiled < 0.1 * to_whole and to_whole > 1


@pytest.mark.parametrize("case", TILED_BY_CONFIGURATION, ids=str, indirect=True)
def test_tiles_that_do_not_join_are_refused(case: FamilyCase, pipeline: VideoPipeline) -> None:
    components = reopened(case, pipeline, vae_tiling=True).components
    components.load_vae(case.workload, CPU).vae.enable_tiling(tile_sample_min_width=44)
    latents = call(case, pipeline, PROMPTS[:1])["latents"]
    with pytest.raises(InvalidRequest, match=r"vae_tiling: .*\(9, 48, 64\), got \(9, 48, 68\): leave it out"):
        components.decode(latents, case.workload, CPU, "np")


def test_tiling_of_a_vae_without_tiles_is_refused(
    case: FamilyCase, pipeline: VideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As AutoencoderMixin.enable_tiling does for a VAE that has no use_tiling.
    refuse = Mock(side_effect=NotImplementedError("Tiling doesn't seem to be implemented."))
    vae = pipeline.components.load_vae(case.workload, CPU).vae
    monkeypatch.setattr(type(vae), "enable_tiling", refuse)
    opened = VideoPipeline(pipeline.checkpoint, pipeline.store, vae_tiling=True)
    with pytest.raises(
        InvalidRequest, match=r"vae_tiling: expected a VAE .* tiles, got Auto\w+: leave it out"
    ):
        opened(**call(case, pipeline, PROMPTS[:1]))


@pytest.mark.parametrize("vae_tiling", [False, True])
def test_no_room_to_decode(
    case: FamilyCase, pipeline: VideoPipeline, vae_tiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*latents: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    opened = reopened(case, pipeline, vae_tiling=vae_tiling)
    monkeypatch.setattr(opened.components.load_vae(case.workload, CPU).vae, "decode", full)
    with pytest.raises(OutOfDeviceMemory) as told:
        opened(**call(case, pipeline, PROMPTS[:1]) | {"num_inference_steps": 2})
    message = str(told.value)
    assert message.startswith("GPU memory of decoding: expected room for engines of ")
    less = "fewer frames, a smaller size, or --offload"
    assert message.endswith(f"9.00 GiB. use {less}" if vae_tiling else f"9.00 GiB. use --vae-tiling, {less}")
